"""The user's data set to checked rows."""
