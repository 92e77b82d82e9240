"""Arguments and exit codes that every command shares. Nothing heavy is imported."""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from shared.errors import UsageError
from shared.launcher import rank


def _on_rank_0(wanted: bool) -> bool:
    """Return `wanted` on rank 0 and False on every other rank."""
    with suppress(UsageError):  # the command itself reports a wrong launcher environment, in one line
        return wanted and rank() == 0
    return wanted


ConfigFile = Annotated[Path, typer.Argument(help="TOML file of the experiment.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="table.field=value ...", metavar="[TABLE.FIELD=VALUE]...")]
JsonOutput = Annotated[
    bool, typer.Option("--json", help="End with one JSON line on standard output.", callback=_on_rank_0)
]

P = ParamSpec("P")


def exits(command: Callable[P, None]) -> Callable[P, None]:
    """Return `command`, made to end the process with its exit code; see `shared.console.run_command`."""

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        from shared.console import run_command

        run_command(lambda: command(*arguments, **options))

    return run
