"""`precog split`: scene changes to rows with start_seconds and end_seconds; no video is encoded again."""

from pathlib import Path

from prepare.table import PrepareReport, Row, read_rows, table_path, video_file, write_rows
from shared.config import Config
from shared.console import Progress
from shared.errors import DataError, require_extra
from shared.media.probe import VideoError, probe

Scene = tuple[float, float]
"""Start and end in seconds from the container's origin of time, as players count."""


def split_table(
    config: Config,
    threshold: float = 3.0,
    min_seconds: float | None = None,
    max_scenes: int | None = None,
) -> PrepareReport:
    """Replace each row of a whole video by rows of its scenes; rows with a start or an end stay as they are.

    A scene shorter than `min_seconds` (None: the smallest frame bucket) gives no row; of more than `max_scenes`, the
    longest give one. The other columns, a caption too, are copied. Raises `UsageError` or `DataError`.
    """
    require_extra("scenedetect", "precog split", "prepare")
    data, table = config.data, table_path(config)
    if min_seconds is None:
        min_seconds = min(data.frame_buckets) / data.fps if data.fps else 0.0
    rows = read_rows(table)
    result: list[Row] = []
    scenes: dict[str, list[Scene]] = {}
    files: dict[str, str] = {}
    with Progress("splitting", len(rows)) as bar:
        for row in rows:
            name, found, kept = str(row.get(data.video_column)), [], []
            try:
                if row.get("start_seconds") is None and row.get("end_seconds") is None:
                    found = find_scenes(video_file(row, config), threshold)
                if len(found) > 1:
                    kept = scenes[name] = keep_scenes(found, min_seconds, max_scenes)
                    if len(kept) < len(found):
                        files[name] = f"{len(found) - len(kept)} of {len(found)} scenes are too short or too many"
            except DataError as error:
                files[name] = str(error)
            result += [row | {"start_seconds": start, "end_seconds": end} for start, end in kept] or [row]
            bar.advance()
    if scenes:
        write_rows(table, result)
    summary = {"videos cut": len(scenes), "rows": len(result), "scenes": scenes}
    return PrepareReport(config=data.name, table=str(table), summary=summary, files=files)


def find_scenes(path: Path, threshold: float = 3.0) -> list[Scene]:
    """Return the scenes of a video in order; `threshold` is that of PySceneDetect's AdaptiveDetector.

    Raises `DataError` if the video cannot be read.
    """
    from scenedetect import AdaptiveDetector, SceneManager, VideoOpenFailure, VideoStreamAv

    manager = SceneManager()
    manager.add_detector(AdaptiveDetector(threshold))
    try:
        late = probe(path).probe.start_us / 1e6  # PySceneDetect counts from the first picture
        manager.detect_scenes(VideoStreamAv(str(path), suppress_output=True))
    except (OSError, ValueError, VideoError, VideoOpenFailure) as error:
        raise DataError(f"cannot be read: {error}") from None
    found = manager.get_scene_list(start_in_scene=True)
    return [(round(start.seconds + late, 6), round(end.seconds + late, 6)) for start, end in found]


def keep_scenes(scenes: list[Scene], min_seconds: float, max_scenes: int | None) -> list[Scene]:
    """Return the scenes of at least `min_seconds`, in order; of more than `max_scenes`, the longest ones."""
    long = [scene for scene in scenes if scene[1] - scene[0] >= min_seconds - 1e-6]
    longest_first = sorted(long, key=lambda scene: (-round(scene[1] - scene[0], 6), scene))
    return sorted(longest_first[: max_scenes or len(long)])
