"""Video files to windows of frames."""
