"""Disk states after a power loss: a record of effects, and the states that a crash may leave.

A crash keeps a prefix of the effects, of which all that no fsync had secured may be missing: a new file's bytes are
there, lost, zeroed or cut in half, and names that were added or removed are old or new, in any combination. This is a
model of what file systems promise, not of the blocks below them.
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


@dataclass(frozen=True)
class Effect:
    """One change of the file system, or an fsync; paths are relative to the cache."""

    kind: str
    path: str
    target: str = ""
    """The name that "link" and "rename" give."""

    @property
    def folders(self) -> set[str]:
        """Those whose names it changes; fsyncs change none."""
        paths = () if self.kind.startswith("fsync") else (self.path, *([self.target] if self.target else []))
        return {str(Path(path).parent) for path in paths}


@dataclass(frozen=True)
class State:
    """What is on the disk, relative to the cache."""

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
        self.contents: dict[str, bytes] = {}
        """Of every file that was made, by its first name, once it has another one or is removed."""

    def __enter__(self) -> "Log":
        Log.active = self
        self._fsync, os.fsync = os.fsync, self.fsync
        return self

    def __exit__(self, *_: object) -> None:
        Log.active = None
        os.fsync = self._fsync

    def fsync(self, fd: Any) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        kind = "fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync"
        if path.is_relative_to(self.root) and kind not in self.ignored:
            self._add(kind, path)

    def notice(self, event: str, arguments: tuple[object, ...]) -> None:
        """Audit events come before the effect, and for what will fail too."""
        if event == "open" and str(arguments[1])[:1] in ("x", "w"):
            self._add("create", Path(str(arguments[0])))
        elif event == "os.mkdir":
            path = Path(str(arguments[0]))
            if not path.exists() and path.parent.exists():
                self._add("mkdir", path)
        elif event == "os.remove" and Path(str(arguments[0])).exists():
            self._add("remove", Path(str(arguments[0])))
        elif event in ("os.link", "os.rename"):
            path, target = Path(str(arguments[0])), Path(str(arguments[1]))
            if event == "os.rename" or not target.exists():
                self._add(event.removeprefix("os."), path, target)

    def _add(self, kind: str, path: Path, target: Path | None = None) -> None:
        if not path.is_relative_to(self.root):
            return
        name = str(path.relative_to(self.root))
        if kind in ("link", "rename", "remove"):
            self.contents.setdefault(name, path.read_bytes())
        self.effects.append(Effect(kind, name, str(target.relative_to(self.root)) if target else ""))


def _notice(event: str, arguments: tuple[object, ...]) -> None:
    if Log.active is not None:
        Log.active.notice(event, arguments)


sys.addaudithook(_notice)


def crashed(log: Log, count: int, lost: set[int], damages: dict[str, int], before: State = EMPTY) -> State:
    """Return the state after `count` effects on top of `before`, without those `lost`, with new files damaged."""
    folders, files = set(before.folders), dict(before.files)
    for number, effect in enumerate(log.effects[:count]):
        if number in lost or not effect.folders <= folders:
            continue
        if effect.kind == "mkdir":
            folders.add(effect.path)
        elif effect.kind in ("create", "link", "rename"):
            content = log.contents[effect.path]
            files[effect.target or effect.path] = DAMAGES[damages.get(effect.path, 0)](content)
        if effect.kind in ("remove", "rename"):
            files.pop(effect.path, None)
    return State(frozenset(folders), frozenset(files.items()))


def insecure(log: Log, count: int) -> tuple[list[int], list[str]]:
    """Effects and new files of the first `count` that no fsync has secured by then."""
    names: list[int] = []
    contents: list[str] = []
    for number, effect in enumerate(log.effects[:count]):
        if effect.kind == "fsync folder":
            names = [other for other in names if effect.path not in log.effects[other].folders]
        elif effect.kind == "fsync":
            contents.remove(effect.path)
        else:
            names.append(number)
            contents += [effect.path] if effect.kind == "create" else []
    return names, contents


def crash_states(log: Log, step: int, draws: random.Random, before: State = EMPTY) -> Iterator[State]:
    """Distinct states after every `step`-th prefix: all combinations, or where they are many, single ones and draws."""
    seen: set[State] = set()
    for count in range(len(log.effects), -1, -step):
        names, contents = insecure(log, count)
        choices: Iterator[Choice]
        if 2 ** len(names) * len(DAMAGES) ** len(contents) <= MAX_STATES:
            kept = itertools.product((False, True), repeat=len(names))
            choices = itertools.product(kept, list(itertools.product(range(len(DAMAGES)), repeat=len(contents))))
        else:
            choices = _some_choices(len(names), len(contents), draws)
        for lost, damages in choices:
            missing = {name for name, is_lost in zip(names, lost, strict=True) if is_lost}
            state = crashed(log, count, missing, dict(zip(contents, damages, strict=True)), before)
            if state not in seen:
                seen.add(state)
                yield state


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
