"""Stage 1: video file + caption -> shards."""
