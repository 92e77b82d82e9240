"""Raw videos to a dataset table: init a project, split scenes, write captions."""
