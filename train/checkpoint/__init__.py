"""Checkpoints: files, resume, identity."""
