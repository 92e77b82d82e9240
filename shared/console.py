"""What people see: rich on rank 0, plain lines where there is no terminal; the exit code of every ending."""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared.config import Config, dump_config
from shared.errors import PrecogError
from shared.launcher import rank

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""For people. Standard output is kept for `--json`."""


def say(message: str) -> None:
    """One line for people, on rank 0 only."""
    if rank() == 0:
        console.print(message, markup=False)


def table(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """A two-column table at the end of a command."""
    if rank() != 0:
        return
    if not console.is_terminal:
        say(title)
        width = max((len(name) for name, _ in rows), default=0) + 2
        for name, value in rows:
            say(f"  {name:<{width}}{value}")
        return
    grid = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        grid.add_row(escape(name), escape(str(value)))
    console.print(grid)


class Progress:
    """A bar with rate and time left; where there is no terminal, a line every ten seconds."""

    LINE_SECONDS = 10.0

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._last_line = time.monotonic()
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=rank() != 0 or not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, rate="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        rate = f"{self._done / max(now - self._started, 1e-9):.2f}/s"
        self._bar.update(self._task, advance=count, rate=rate)
        if not console.is_terminal and now - self._last_line >= self.LINE_SECONDS:
            self._last_line = now
            seconds = (now - self._started) / self._done * (self._total - self._done)
            say(f"{self._what}: {self._done}/{self._total}, {rate}, {seconds:.0f} s left")


def show_config(config: Config) -> None:
    """Print the resolved config, as TOML."""
    say(dump_config(config).rstrip())


def quiet_libraries() -> None:
    """Keep the progress bars and notices of the libraries below ours out of sight."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run a command's body and end the process with the exit code of how it went; one line per user's fault."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        command()
    except PrecogError as error:
        console.print(f"precog: {error}", markup=False)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder where a file should be
        where = f"{error.filename}: " if error.filename else ""
        console.print(f"precog: {where}{error.strerror or error}", markup=False)
        sys.exit(PrecogError.exit_code)
    except KeyboardInterrupt:
        console.print("precog: interrupted; the same command goes on from here", markup=False)
        sys.exit(75)
    sys.exit(0)


def bytes_text(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
