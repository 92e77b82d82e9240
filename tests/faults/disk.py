"""Disk states after a power loss: a record of effects, and the states that a crash may leave.

A crash keeps a prefix of the effects, of which all that no fsync had secured may be missing: bytes of a new file, or
added to one, are there, lost, zeroed or cut in half, and names that were added or removed are old or new, in any
combination. This is a model of what file systems promise, not of the blocks below them.
"""

import itertools
import os
import random
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DAMAGES: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: content,
    lambda content: b"",
    lambda content: bytes(len(content)),
    lambda content: content[: len(content) // 2],
)
Choice = tuple[tuple[bool, ...], tuple[int, ...]]
"""Which names are lost, and how each new file is damaged."""
MAX_STATES = 256
"""Of one prefix; more are drawn from."""


@dataclass
class Effect:
    """One change of the file system, or an fsync; paths are relative to the root."""

    kind: str
    path: str
    target: str = ""
    """The name that "link" and "rename" give."""
    file: int | None = None
    """Index of the file's content; None for a folder."""
    size: int = 0
    """Bytes of the file before the next effect."""

    @property
    def folders(self) -> set[str]:
        """Those whose names it changes; fsyncs and appending change none."""
        if self.kind.startswith("fsync") or self.kind == "append":
            return set()
        return {str(Path(path).parent) for path in (self.path, *([self.target] if self.target else []))}


@dataclass(frozen=True)
class State:
    """What is on the disk, relative to the root."""

    folders: frozenset[str] = frozenset({"."})
    files: frozenset[tuple[str, bytes]] = frozenset()

    def write(self, root: Path) -> None:
        for folder in sorted(self.folders):
            (root / folder).mkdir(parents=True)
        for name, content in self.files:
            (root / name).write_bytes(content)


EMPTY = State()


class Log:
    """Records what happens below `root`, while entered; `ignored` fsyncs are not done ("fsync", "fsync folder")."""

    active: "Log | None" = None

    def __init__(self, root: Path, ignored: tuple[str, ...] = ()) -> None:
        self.root, self.ignored = root, ignored
        self.effects: list[Effect] = []
        self.contents: list[bytes] = []
        """Of every file, as long as it became."""
        self._files: dict[str, int] = {}
        """Name -> index of the content."""

    def __enter__(self) -> "Log":
        Log.active = self
        self._fsync, os.fsync = os.fsync, self.fsync
        return self

    def __exit__(self, *_: object) -> None:
        Log.active = None
        os.fsync = self._fsync
        for name in self._files:
            self._look(name)

    def fsync(self, fd: Any) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        kind = "fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync"
        if kind not in self.ignored:
            self._add(kind, path)

    def notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Audit events come before the effect, and for what will fail too."""
        if event == "open" and str(arguments[1])[:1] in ("x", "w", "a"):
            path = Path(str(arguments[0]))
            self._add("append" if str(arguments[1])[0] == "a" and path.exists() else "create", path)
        elif event == "os.mkdir":
            path = Path(str(arguments[0]))
            if not path.exists() and path.parent.exists():
                self._add("mkdir", path)
        elif event in ("os.remove", "os.rmdir"):
            path = Path(str(arguments[0]))
            if arguments[1] >= 0:  # relative to an open folder
                path = Path(f"/proc/self/fd/{arguments[1]}").readlink() / path
            if path.exists():
                self._add(event.removeprefix("os."), path)
        elif event in ("os.link", "os.rename"):
            path, target = Path(str(arguments[0])), Path(str(arguments[1]))
            if event == "os.rename" or not target.exists():
                self._add(event.removeprefix("os."), path, target)

    def _add(self, kind: str, path: Path, target: Path | None = None) -> None:
        if not path.is_relative_to(self.root):
            return
        name, new_name = (str(each.relative_to(self.root)) if each else "" for each in (path, target))
        if self.effects and (last := self.effects[-1]).file is not None:
            last.size = self._look(last.target or last.path)
        if kind == "create":
            self._files[name] = len(self.contents)
            self.contents.append(b"")
        elif name not in self._files and path.is_file():  # older than the log
            self._files[name] = len(self.contents)
            self.contents.append(path.read_bytes())
        effect = Effect(kind, name, new_name, self._files.get(name))
        if kind == "remove":
            self._look(name)
            del self._files[name]
        elif kind in ("link", "rename"):
            moved = [each for each in self._files if each == name or each.startswith(f"{name}/")]
            for each in moved:
                self._look(each)
                self._files[new_name + each.removeprefix(name)] = self._files[each]
                if kind == "rename":
                    del self._files[each]
        self.effects.append(effect)

    def _look(self, name: str) -> int:
        """Keep a file's content, which only grows; return its size."""
        path = self.root / name
        if name in self._files and path.exists():
            self.contents[self._files[name]] = path.read_bytes()
            return path.stat().st_size
        return 0


def _notice(event: str, arguments: tuple[object, ...]) -> None:
    if Log.active is not None:
        Log.active.notice(event, arguments)


sys.addaudithook(_notice)


def crashed(log: Log, count: int, lost: set[int], damages: dict[int, int], before: State = EMPTY) -> State:
    """Return the state after `count` effects on top of `before`, without those `lost`, with new bytes damaged."""
    folders, files = set(before.folders), dict[str, int | bytes](before.files)
    sizes, safe = dict[int, int](), dict[int, int]()
    for number, effect in enumerate(log.effects[:count]):
        if effect.file is not None:
            sizes[effect.file] = max(effect.size, sizes.get(effect.file, 0))
            safe |= {effect.file: sizes[effect.file]} if effect.kind == "fsync" else {}
        if number in lost or not effect.folders <= folders:
            continue
        inside = [name for name in (*folders, *files) if name.startswith(f"{effect.path}/")]
        if effect.kind == "mkdir":
            folders.add(effect.path)
        elif effect.kind == "rmdir" and not inside:
            folders.discard(effect.path)
        elif effect.kind == "rename" and effect.path in folders:
            folders.add(effect.target)
            folders.remove(effect.path)
            files |= {effect.target + name.removeprefix(effect.path): files.pop(name) for name in inside}
        elif effect.kind in ("create", "link", "rename") and effect.file is not None:
            files[effect.target or effect.path] = effect.file
        if effect.kind in ("remove", "rename"):
            files.pop(effect.path, None)

    def content(found: int | bytes) -> bytes:
        if isinstance(found, bytes):
            return found
        whole, kept = log.contents[found][: sizes[found]], safe.get(found, 0)
        return whole[:kept] + DAMAGES[damages.get(found, 0)](whole[kept:])

    return State(frozenset(folders), frozenset((name, content(found)) for name, found in files.items()))


def insecure(log: Log, count: int) -> tuple[list[int], list[int]]:
    """Effects and new files of the first `count` that no fsync has secured by then."""
    names: list[int] = []
    contents: dict[int, None] = {}
    for number, effect in enumerate(log.effects[:count]):
        if effect.kind == "fsync folder":
            names = [other for other in names if effect.path not in log.effects[other].folders]
        elif effect.kind == "fsync" and effect.file is not None:
            contents.pop(effect.file, None)
        else:
            names += [number] if effect.folders else []
        if effect.kind in ("create", "append") and effect.file is not None:
            contents[effect.file] = None
    return names, list(contents)


def crash_states(log: Log, step: int, draws: random.Random, before: State = EMPTY) -> Iterator[State]:
    """Distinct states after every `step`-th prefix, from the last; see `states_after`."""
    seen: set[State] = set()
    for count in range(len(log.effects), -1, -step):
        for state in states_after(log, count, draws, before):
            if state not in seen:
                seen.add(state)
                yield state


def states_after(log: Log, count: int, draws: random.Random, before: State = EMPTY) -> Iterator[State]:
    """States after `count` effects: all combinations, or where they are many, single ones and draws."""
    names, contents = insecure(log, count)
    choices: Iterator[Choice]
    if 2 ** len(names) * len(DAMAGES) ** len(contents) <= MAX_STATES:
        kept = itertools.product((False, True), repeat=len(names))
        choices = itertools.product(kept, list(itertools.product(range(len(DAMAGES)), repeat=len(contents))))
    else:
        choices = _some_choices(len(names), len(contents), draws)
    for lost, damages in choices:
        missing = {name for name, is_lost in zip(names, lost, strict=True) if is_lost}
        yield crashed(log, count, missing, dict(zip(contents, damages, strict=True)), before)


def _some_choices(names: int, contents: int, draws: random.Random) -> Iterator[Choice]:
    """Each name alone lost, each file alone damaged, and as many draws."""
    for index in range(names):
        yield tuple(other == index for other in range(names)), (0,) * contents
    for index, damage in itertools.product(range(contents), range(1, len(DAMAGES))):
        yield (False,) * names, tuple(damage if other == index else 0 for other in range(contents))
    for _ in range(names + contents):
        yield (
            tuple(draws.random() < 0.3 for _ in range(names)),
            tuple(draws.choices(range(len(DAMAGES)), (3, 1, 1, 1), k=contents)),
        )
