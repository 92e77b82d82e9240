"""Output for people: rich on rank 0, plain lines without a terminal. Standard output is kept for `--json`."""

import json
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich import progress
from rich.console import Console
from rich.live import Live
from rich.text import Text

from shared.launcher import rank

console = Console(stderr=True, highlight=False, soft_wrap=True)
logger = logging.getLogger("precog")
"""Everything that is said, for the log file; nothing of it is printed again."""
logger.propagate = False
logger.addHandler(logging.NullHandler())
logging.raiseExceptions = False  # a log on a full disk must not fill the terminal with tracebacks


def say(message: str) -> None:
    """Print one line on rank 0; it also goes to the log file, if one is open."""
    if rank() == 0:
        console.print(fitted(message), markup=False)
        logger.warning("%s", message)


def fitted(message: str) -> str:
    """Return the message with its lines broken between words, where a terminal would break them anywhere."""
    if not console.is_terminal:
        return message
    wrap = textwrap.TextWrapper(
        console.width - 1, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrap.fill(line) for line in message.split("\n"))


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append what is said and warned of within the context to a file, with its time, and the error that ends it."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    loggers = (logger, logging.getLogger())
    for one in loggers:
        one.addHandler(handler)
    try:
        yield
    except BaseException as error:
        logger.warning("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        for one in loggers:
            one.removeHandler(handler)
        handler.close()


def table(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """Print a title and two aligned columns on rank 0."""
    say(title)
    width = max((len(name) for name, _ in rows), default=0) + 2
    for name, value in rows:
        say(f"  {name:<{width}}{value}")


class StatusLine:
    """One line that the next one replaces; without a terminal, a line every ten seconds or where the caller says so."""

    LINE_SECONDS = 10.0

    def __init__(self) -> None:
        self._live = Live(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._last_line = -self.LINE_SECONDS
        self._text = ""

    def __enter__(self) -> "StatusLine":
        if rank() == 0 and console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last line on the terminal."""
        self._live.stop()
        if self._text and console.is_terminal:
            say(self._text)

    def show(self, text: str, due: bool | None = None) -> None:
        """Replace the line by `text`; without a terminal, print it if `due`, or if None, every ten seconds."""
        now = time.monotonic()
        self._text = text
        self._live.update(Text(text, no_wrap=True, overflow="crop"))
        if due or (due is None and now - self._last_line >= self.LINE_SECONDS):
            self._last_line = now
            if console.is_terminal:
                logger.warning("%s", text)
            else:
                say(text)


class Progress:
    """One updating line with count, rate, elapsed and remaining time; without a terminal, a line every ten seconds."""

    LINE_SECONDS = 10.0

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total, self._done = description, total, 0
        self._started = time.monotonic()
        self._every = 0.1 if console.is_terminal else self.LINE_SECONDS
        self._due = self._started + self._every
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=rank() != 0 or not console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, rate="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Count `count` more as done."""
        self._done += count
        now = time.monotonic()
        if now < self._due and self._done < self._total:
            return
        rate = f"{self._done / max(now - self._started, 1e-9):.2f}/s"
        self._bar.update(self._task, completed=self._done, rate=rate)
        if now >= self._due and not console.is_terminal:
            seconds = (now - self._started) / self._done * (self._total - self._done)
            say(f"{self._description}: {self._done}/{self._total}, {rate}, {seconds:.0f} s left")
        if now >= self._due:
            self._due = now + self._every


def track(description: str) -> Callable[[Sequence[str]], Iterator[str]]:
    """Return a function that yields the items it is given and shows how many are done."""

    def iterate(items: Sequence[str]) -> Iterator[str]:
        with Progress(description, len(items)) as bar:
            for item in items:
                yield item
                bar.advance()

    return iterate


def say_first(lines: Iterable[str], limit: int = 20) -> None:
    """Print the first lines and the number of the rest; --json has all."""
    every = list(lines)
    for line in every[:limit]:
        say("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line))
    if len(every) > limit:
        say(f"... and {len(every) - limit} more")


def show_config(config: BaseModel) -> None:
    """Print the fields that differ from their defaults, one line per table; `precog config` prints all of them."""
    for name, fields in config:
        kinds, values = type(fields).model_fields, fields.model_dump(mode="json")
        changed = [field for field, value in fields if value != kinds[field].get_default(call_default_factory=True)]
        if changed:
            say(f"[{name}] " + " ".join(f"{field}={json.dumps(values[field])}" for field in changed))


def quiet_libraries() -> None:
    """Turn off the progress bars and notices of transformers, diffusers and huggingface_hub."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if "diffusers" in sys.modules:  # which has read the variable already
        sys.modules["diffusers"].utils.logging.set_verbosity_error()


def bytes_text(size: float) -> str:
    """Return `size` with a binary unit: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
