"""Facts about files and texts in the cache, `probes/`: each is found once, by one worker, and read by the others.

A file is known by its mark: other bytes under the same inode, size and times would be missed. So probes of an earlier
run are an opt-in, and those of another worker count for a day.
"""

import hashlib
import json
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

from precompute.assignments import Part
from shared.cache.index import READERS
from shared.cache.remote import is_temporary
from shared.cache.storage import Storage
from shared.errors import CacheError
from shared.fingerprint import canonical_json, key_of
from shared.media.pool import DecodePool
from shared.media.probe import FileMark, Probed, Skipped, mark_of, parse_probe

READER = f"4 av {version('av')}"
"""Names the facts that `probe` finds and the way it finds them; a change of either needs another name."""
NOTES_BYTES = 256 * 2**20
RUN_SECONDS = 24 * 60 * 60.0
"""Age of the probes that another worker of the same run may have made."""
PUBLISH_SECONDS = 20.0
PATIENCE_SECONDS = 90.0
"""Time without news from the other workers, after which their files are probed here."""
HELP_FILES = 64
"""Files of other workers that are probed before the next look at the cache."""


class Notes:
    """Facts by name below a folder of the cache. Every writer adds files of its own; a damaged one is ignored."""

    def __init__(self, storage: Storage, folder: str, younger_than_seconds: float | None = None) -> None:
        self.facts: dict[str, Any] = {}
        self._storage, self._folder, self._max_age = storage, f"probes/{folder}", younger_than_seconds
        self._known: set[str] = set()

    def refresh(self) -> bool:
        """Read the files that other writers have added; True if there were any."""
        oldest = 0.0 if self._max_age is None else time.time() - self._max_age
        entries = self._storage.entries(self._folder)
        young = {name for name, entry in entries.items() if entry.modified > oldest and not is_temporary(name)}
        names = sorted(young - self._known)
        with ThreadPoolExecutor(READERS) as pool:
            for facts in pool.map(partial(_read_notes, self._storage), names):
                self.facts |= facts
        self._known |= set(names)
        return bool(names)

    def publish(self, facts: Mapping[str, Any]) -> None:
        """Add facts."""
        if not facts:
            return
        self.facts |= facts
        content = zlib.compress(canonical_json(facts), 1)
        name = f"{self._folder}/{hashlib.sha256(content).hexdigest()}.json"
        self._storage.publish(name, content)
        self._known.add(name)


def _read_notes(storage: Storage, name: str) -> dict[str, Any]:
    try:
        content = storage.read(name, limit_bytes=NOTES_BYTES)
        if hashlib.sha256(content).hexdigest() != Path(name).stem:
            return {}
        facts = json.loads(zlib.decompressobj().decompress(content, NOTES_BYTES))
        return facts if isinstance(facts, dict) else {}
    except (CacheError, ValueError, RecursionError, zlib.error):
        return {}


def probe_files(
    storage: Storage, paths: Sequence[Path], pool: DecodePool, part: Part, *, remember: bool
) -> Iterator[tuple[Path, Probed | Skipped]]:
    """Yield the content of each file, in any order.

    Of several workers each probes its part, then waits for the other parts, and probes what nobody reports.
    With `remember` the probes of earlier runs count too.
    """
    if part.count == 1 and not remember:
        yield from zip(paths, pool.probe_all(paths), strict=True)
        return
    notes = Notes(storage, f"videos-{key_of(READER)}", None if remember else RUN_SECONDS)
    marks = {path: mark for path in paths if (mark := _mark(path))}
    names = {path: _note_name(mark) for path, mark in marks.items()}
    waiting = dict.fromkeys(paths)
    own, started = set(paths[part.index :: part.count]), time.monotonic()
    news, patience = started, PATIENCE_SECONDS
    while waiting:
        if notes.refresh():
            news = time.monotonic()
        for path in [path for path in waiting if names.get(path) in notes.facts]:
            yield path, _outcome(notes.facts[names[path]], marks[path])
            del waiting[path]
        mine = [path for path in waiting if path in own or path not in marks]
        if not mine and waiting and time.monotonic() - news < patience:
            time.sleep(min(1.0, patience / 10))
            continue
        help_with = sorted(waiting, key=lambda path: key_of([part.index, str(path)]))[:HELP_FILES]
        for path, outcome in _publish_each(notes, mine or help_with, pool, marks):
            yield path, outcome
            del waiting[path]
        if mine:  # the other parts take about as long
            patience = min(patience, 1 + 2 * (time.monotonic() - started))


def _publish_each(
    notes: Notes, paths: Sequence[Path], pool: DecodePool, marks: Mapping[Path, FileMark]
) -> Iterator[tuple[Path, Probed | Skipped]]:
    """Probe the files, and publish what is found every few seconds."""
    found: dict[str, Any] = {}
    published = time.monotonic()
    try:
        for path, outcome in zip(paths, pool.probe_all(paths), strict=True):
            if isinstance(outcome, Probed):
                found[_note_name(outcome.probe.mark)] = _note(outcome)
            elif outcome.permanent and path in marks:
                found[_note_name(marks[path])] = outcome.reason
            if time.monotonic() - published > PUBLISH_SECONDS:
                notes.publish(found)
                found, published = {}, time.monotonic()
            yield path, outcome
    finally:
        notes.publish(found)


def _mark(path: Path) -> FileMark | None:
    try:
        return mark_of(path.stat())
    except OSError:  # the probe gives the reason
        return None


def _note_name(mark: FileMark) -> str:
    """Return the mark without the device, whose number differs between machines that share a file system."""
    return " ".join(map(str, mark[1:]))


def _note(found: Probed) -> list[Any]:
    steps = (later - earlier for earlier, later in pairwise([0, *found.timestamps_us]))
    return [asdict(found.probe), [[step, len([*same])] for step, same in groupby(steps)]]


def _outcome(note: Any, mark: FileMark) -> Probed | Skipped:
    if isinstance(note, str):
        return Skipped(note)
    fields, steps = note
    times = array("q", accumulate(step for step, count in steps for _ in range(count)))
    return Probed(parse_probe({**fields, "mark": mark}), times)
