"""File types that count as videos and images in a folder; probing finds out which of them decode."""

import shlex
from pathlib import PurePosixPath

VIDEO_SUFFIXES = {".3g2", ".3gp", ".asf", ".avi", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc", ".ivf", ".m1v"}
VIDEO_SUFFIXES |= {".m2t", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf"}
VIDEO_SUFFIXES |= {".nut", ".ogm", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv", ".y4m"}
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Stills for a bucket of one frame; a PNG or WebP file may be animated."""
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,gif,apng,ogg,yuv4mpegpipe,mxf,dv,nut"
VIDEO_FORMATS += ",ivf,h264,hevc,obu,m4v,mpegvideo"
"""FFmpeg's readers for these, without playlists, which open other files."""


def with_names(advice: str, name: str) -> str:
    """Return `advice` to convert a file, such as `ffmpeg -i VIDEO NEW.mp4`, for the file `name` and a new one."""
    path = PurePosixPath(name)
    new = path.with_suffix(".mp4") if path.suffix.lower() != ".mp4" else path.with_name(f"{path.stem}-new.mp4")
    return advice.replace("VIDEO", shlex.quote(name)).replace("NEW.mp4", shlex.quote(str(new)))
