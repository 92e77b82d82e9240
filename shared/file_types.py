"""File types that count as videos and images in a folder; probing finds out which of them decode."""

VIDEO_SUFFIXES = {".3g2", ".3gp", ".asf", ".avi", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc", ".ivf", ".m1v"}
VIDEO_SUFFIXES |= {".m2t", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf"}
VIDEO_SUFFIXES |= {".nut", ".ogm", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv", ".y4m"}
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Stills for a bucket of one frame; a PNG or WebP file may be animated."""
