"""The page of a data set: usable clips, clips to look at and why, captions, crops, duplicates; from the cache alone."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from report import charts
from report.clip_measures import ClipMeasures, describe, duplicates, measure, unusual
from report.filmstrips import FEW_CLIPS, STRIP_FRAMES, STRIPS_PER_SHEET, cell_size, write_sheet
from report.page import script_json, write_page
from shared.atomic_files import replacing
from shared.cache.collection import SampleReader, read_recipe
from shared.cache.storage import open_storage
from shared.cache.view import View, ViewRow, read_view, rows_of
from shared.caption_lint import lint_captions
from shared.config import Config
from shared.fingerprint import key_of
from shared.model.geometry import video_tokens
from shared.model.pretrained import pretrained_config

PAGE, NUMBERS, LEAVE_OUT = "data.html", "data.js", "leave_out.txt"
READERS = 8
"""Clips whose thumbnails are read at the same time."""
BLACK_SHARE = 0.5
MIN_CLIPS_FOR_OUTLIERS = 20
MUCH_CROPPED, MUCH_ENLARGED = 0.4, 1.25
"""Share of the picture, and enlargement, from which a clip is listed under them."""
KINDS = {
    "black": "black pictures",
    "static": "nothing moves",
    "cut": "a cut inside the clip",
    "letterbox": "black bars",
    "duplicate": "repeats another clip",
    "outlier": "unlike the other clips",
}
"""Faults by which a clip is to be looked at, and their names for people; the first that a clip has hides `outlier`."""
NOTES = {"cropped": "much is cropped", "enlarged": "enlarged", "long caption": "caption cut short"}
"""Properties that are listed, without making a clip one to look at."""

Thumbnails = Callable[[str], np.ndarray]
"""Key -> uint8 [F,3,h,w]."""


@dataclass(frozen=True, slots=True)
class ClipEntry:
    """One stored clip on the page; None is unknown."""

    key: str
    source: str
    start_seconds: float
    end_seconds: float
    split: str
    bucket: str
    tokens: int
    captions: tuple[str, ...]
    caption_tokens: tuple[int, ...]
    cropped: float | None
    """Share of the picture outside the crop."""
    enlarged: float | None
    """Factor from the source's pixels to the clip's."""
    source_seconds: float | None
    motion: float
    faults: dict[str, str]
    """Fault -> the reason in words."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DataReport:
    """The numbers of a data set's page, which are those of `--json`."""

    name: str
    view: str
    """Hash of the view."""
    text_length: int
    clips: tuple[ClipEntry, ...]
    """By source and time, as in the filmstrips."""
    skipped: tuple[tuple[str, str], ...]
    """Source and reason."""
    captions: tuple[tuple[str, str], ...]
    """Kind and message of each weakness of the captions."""
    unused_seconds: float | None
    """Of the sources: what no clip covers."""

    @property
    def flagged(self) -> tuple[ClipEntry, ...]:
        return tuple(clip for clip in self.clips if clip.faults)

    @property
    def verdict(self) -> str:
        looked, skipped = len(self.flagged), len(self.skipped)
        return f"{len(self.clips) - looked} clips usable, {looked} to look at, {skipped} left out."

    @property
    def counts(self) -> dict[str, int]:
        """Kind of fault or note -> clips that have it."""
        found = Counter(kind for clip in self.clips for kind in (*clip.faults, *clip.notes))
        return {kind: found[kind] for kind in (*KINDS, *NOTES) if found[kind]}

    @property
    def buckets(self) -> list[dict[str, Any]]:
        """Bucket, tokens and clips, the largest number of clips first."""
        found = Counter((clip.bucket, clip.tokens) for clip in self.clips)
        ordered = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
        return [{"bucket": bucket, "tokens": tokens, "clips": count} for (bucket, tokens), count in ordered]

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Reasons of skips up to their first colon, most frequent first."""
        found = Counter(reason.partition(":")[0] for _, reason in self.skipped)
        return sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))

    def as_json(self) -> dict[str, Any]:
        """Return the object of `--json`."""
        more = {"verdict": self.verdict, "counts": self.counts, "buckets": self.buckets, "skip_reasons": self.reasons}
        return more | asdict(self)


def report_data(config: Config, folder: Path | None = None, name: str = "CONFIG") -> tuple[DataReport, Path]:
    """Write the page of the config's view and its side files into `folder`; return the numbers and the page's path.

    `name` is that of the config file. Raise `CacheError` if the view is missing or damaged.
    """
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    view = read_view(storage, config.data.name)
    folder = folder or page_folder(config)
    reader = SampleReader(storage, view.latents, {row.latent_key for row in view.rows}, whole_up_to_bytes=0)
    transformer = pretrained_config(config.model, "transformer")

    def tokens(row: ViewRow) -> int:
        return video_tokens(row.bucket, transformer["patch_size"], transformer.get("patch_size_t"))

    def read(key: str) -> np.ndarray:
        found: np.ndarray = reader.read_part(key, "thumbnails").numpy()
        return found

    given = config.data.leave_out  # its clips are no longer in the view, but must stay in the list
    already = given.read_text("utf-8").splitlines() if given is not None and given.is_file() else []
    text_length = read_recipe(storage, view.prompts)["text_length"]
    report = make_report(view, text_length, tokens, read, folder)
    return report, write_data_page(report, folder, name, already)


def page_folder(config: Config) -> Path:
    """Return the folder of the page unless another one is given."""
    return config.train.output_dir.parent / f"{config.data.name}-data"


def is_current(config: Config) -> bool:
    """Return True if the page shows the config's stored view already."""
    view, folder = read_view(open_storage(config.precompute.cache), config.data.name), page_folder(config)
    try:
        return (folder / PAGE).exists() and _view_name(view) in (folder / NUMBERS).read_text("utf-8")
    except OSError:
        return False


def _view_name(view: View) -> str:
    """Return a hash of all that the page shows of the view."""
    return key_of({"rows": rows_of(view.rows).table.to_pydict(), "settings": view.settings})


def make_report(
    view: View, text_length: int, tokens: Callable[[ViewRow], int], read: Thumbnails, folder: Path
) -> DataReport:
    """Measure every clip, write the filmstrips into `folder` and return the numbers."""
    rows = sorted([*view.split("train"), *view.split("held_out")], key=_place)
    measures: dict[str, ClipMeasures] = {}
    descriptors: dict[str, np.ndarray] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(rows), STRIPS_PER_SHEET):
            part = rows[start : start + STRIPS_PER_SHEET]
            pictures = list(pool.map(read, [row.latent_key for row in part]))
            for row, shown in zip(part, pictures, strict=True):
                if row.latent_key not in measures:
                    measures[row.latent_key], descriptors[row.latent_key] = measure(shown), describe(shown)
            write_sheet(folder, start // STRIPS_PER_SHEET, pictures, cell_size(len(rows)))
    letterboxed = view.settings.get("data.video_reshape_mode") == "letterbox"
    faults = _faults(rows, measures, descriptors, letterboxed=letterboxed)
    clips = [
        _entry(row, tokens(row), measures[row.latent_key].motion, faults[number], letterboxed=letterboxed)
        for number, row in enumerate(rows)
    ]
    trigger = str(view.settings.get("data.id_token") or "")
    captions = [text for text, _ in {(text, row.source): None for row in rows for text in row.captions}]
    lint = [(found.kind, found.message) for found in lint_captions(captions, trigger, None, text_length)]
    cut = sum(any(clip.caption_tokens) and max(clip.caption_tokens) > text_length for clip in clips)
    lint += [("too_long", f"{cut} of {len(clips)} clips have captions longer than {text_length} tokens")] if cut else []
    return DataReport(
        name=view.name,
        view=_view_name(view),
        text_length=text_length,
        clips=tuple(clips),
        skipped=tuple(sorted((row.source, row.skipped) for row in view.split("skipped"))),
        captions=tuple(lint),
        unused_seconds=_unused_seconds(rows),
    )


def _place(row: ViewRow) -> tuple[str, float, bool, str]:
    return row.source, row.start_seconds, row.flip, row.latent_key


def clip_name(row: ViewRow | ClipEntry) -> str:
    """Return source and start of a clip for people."""
    return f"{row.source} at {row.start_seconds:.2f} s"


def _faults(
    rows: Sequence[ViewRow],
    measures: Mapping[str, ClipMeasures],
    descriptors: Mapping[str, np.ndarray],
    *,
    letterboxed: bool,
) -> list[dict[str, str]]:
    """Return fault -> reason for each row; `letterboxed` clips have bars by the config."""
    first = {row.latent_key: row for row in reversed(rows)}
    keys, strange, repeats = [*measures], _outliers(measures), dict[str, str]()
    if keys:
        for clip, earlier, cosine in duplicates(np.stack([*descriptors.values()])):
            if measures[keys[clip]].black < BLACK_SHARE:
                repeats[keys[clip]] = f"like {clip_name(first[keys[earlier]])}, cosine {cosine:.3f}"
    found: list[dict[str, str]] = []
    for row in rows:
        key, faults = row.latent_key, dict[str, str]()
        if row.source != first[key].source:  # else the table names the clip twice
            faults["duplicate"] = f"the same bytes and window as {clip_name(first[key])}"
        elif key in repeats:
            faults["duplicate"] = repeats[key]
        faults |= _own_faults(measures[key], row.frames, letterboxed=letterboxed)
        if not faults and key in strange:
            faults["outlier"] = strange[key]
        found.append(faults)
    return found


def _own_faults(clip: ClipMeasures, frames: int, *, letterboxed: bool) -> dict[str, str]:
    faults: dict[str, str] = {}
    if clip.black >= BLACK_SHARE:
        return {"black": f"{clip.black:.0%} of its pictures"}
    if not clip.moves and frames > 1:
        faults["static"] = f"brightness changes by {clip.motion:.2f} of 255 on average"
    if clip.cuts:
        faults["cut"] = f"at {', '.join(f'{4 * (frame - 1) + 1}' for frame in clip.cuts)} of {frames} frames"
    if clip.border and not letterboxed:
        faults["letterbox"] = f"{clip.border:.0%} of its height or width"
    return faults


def _outliers(measures: Mapping[str, ClipMeasures]) -> dict[str, str]:
    """Return key -> reason for the clips whose brightness, contrast, color or motion is far from the others'."""
    found: dict[str, str] = {}
    if len(measures) < MIN_CLIPS_FOR_OUTLIERS:
        return found
    for name in ("brightness", "contrast", "saturation", "motion"):
        values = np.array([getattr(clip, name) for clip in measures.values()])
        middle = float(np.median(values))
        for number in np.flatnonzero(unusual(np.log1p(values))):
            found.setdefault(list(measures)[number], f"{name} is {values[number]:.0f}, {middle:.0f} in the middle clip")
    return found


def _entry(row: ViewRow, tokens: int, motion: float, faults: dict[str, str], *, letterboxed: bool) -> ClipEntry:
    cropped, enlarged = None, None
    if row.source_height and row.source_width:
        scales = row.height / row.source_height, row.width / row.source_width
        enlarged = min(scales) if letterboxed else max(scales)
        cropped = max(0.0, 1 - row.height * row.width / (enlarged**2 * row.source_height * row.source_width))
    notes = [
        ("cropped", cropped is not None and cropped > MUCH_CROPPED),
        ("enlarged", enlarged is not None and enlarged > MUCH_ENLARGED),
        ("long caption", any(row.truncated_tokens)),
    ]
    return ClipEntry(
        key=row.latent_key,
        source=row.source,
        start_seconds=row.start_seconds,
        end_seconds=row.end_seconds,
        split=row.split,
        bucket=str(row.bucket),
        tokens=tokens,
        captions=row.captions,
        caption_tokens=row.caption_tokens,
        cropped=None if cropped is None else round(cropped, 4),
        enlarged=None if enlarged is None else round(enlarged, 4),
        source_seconds=row.source_seconds or None,
        motion=round(motion, 3),
        faults=faults,
        notes=tuple(name for name, has in notes if has),
    )


def _unused_seconds(rows: Sequence[ViewRow]) -> float | None:
    """Return the seconds of the sources that no clip covers; None if a duration is unknown."""
    spans: dict[str, list[tuple[float, float]]] = {}
    lengths: dict[str, float] = {}
    for row in rows:
        last = (row.end_seconds - row.start_seconds) / max(1, row.frames - 1)  # how long the last picture is shown
        spans.setdefault(row.source, []).append((row.start_seconds, row.end_seconds + last))
        lengths[row.source] = row.source_seconds
    if not rows or not all(lengths.values()):
        return None
    used = 0.0
    for parts in spans.values():
        end = 0.0
        for start, stop in sorted(parts):
            used += max(0.0, stop - max(start, end))
            end = max(end, stop)
    return round(max(0.0, sum(lengths.values()) - used), 3)


def write_data_page(report: DataReport, folder: Path, config: str = "CONFIG", already: Sequence[str] = ()) -> Path:
    """Write the page and its side files into `folder`, whose filmstrips exist; return the page's path.

    `config` names the config file in the command that leaves clips out, `already` are the lines of the list in use.
    """
    leave_out = [*already, *(leave_out_line(clip) for clip in report.flagged)]
    _write(folder / NUMBERS, f"window.showClips({script_json(report.as_json())});\n")
    _write(folder / LEAVE_OUT, "".join(f"{line}\n" for line in leave_out))
    tokens = [max(clip.caption_tokens) for clip in report.clips if clip.caption_tokens]
    motion = [clip.motion for clip in report.clips]
    specs = {
        "tokens": charts.histogram_chart(tokens, "tokens of the longest caption", "clips", rule=report.text_length),
        "motion": charts.histogram_chart(motion, "motion: mean change of brightness, levels of 255", "clips"),
    }
    width, height = cell_size(len(report.clips))
    zoom = 2 if len(report.clips) <= FEW_CLIPS else 4
    return write_page(
        folder / PAGE,
        "data.html",
        title=f"Data set {report.name}",
        report=report,
        kinds=KINDS | NOTES,
        cropped=_middle([clip.cropped for clip in report.clips]),
        strips={"width": width, "height": height, "zoom": zoom, "frames": STRIP_FRAMES, "sheet": STRIPS_PER_SHEET},
        numbers=NUMBERS,
        command=shlex.join(["precog", "precompute", config, f"data.leave_out={folder / LEAVE_OUT}"]),
        leave_out=leave_out,
        charts={name: spec for name, spec in specs.items() if spec},
    )


def leave_out_line(clip: ClipEntry) -> str:
    """Return a flagged clip's line for `data.leave_out`, printable, with its faults as a comment."""
    name = json.dumps(clip.source, ensure_ascii=not clip.source.isprintable())
    return f"{clip.key} {name}  # at {clip.start_seconds:.2f} s: {', '.join(clip.faults)}"


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _write(path: Path, text: str) -> None:
    with replacing(path) as pending:
        pending.write_text(text, "utf-8")
