"""The cache between the stages: format, reading, checking."""
