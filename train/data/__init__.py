"""The order of the clips, and their examples."""
