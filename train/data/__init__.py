"""Which clips when, and their examples."""
