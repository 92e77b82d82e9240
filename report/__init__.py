"""Self-contained HTML pages about the data and the runs."""
