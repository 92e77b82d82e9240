"""Arguments and exit codes that every command shares. Nothing heavy is imported."""

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from shared.errors import PrecogError, Preempted, UsageError
from shared.launcher import rank
from shared.redaction import redacted


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
    """Return `command`, made to end the process with its exit code; an error that a user can act on is one line."""

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        from shared.console import console, fitted

        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        try:
            command(*arguments, **options)
        except PrecogError as error:
            message, code = str(error), error.exit_code
        except OSError as error:  # a full disk, a folder where a file should be
            where = f"{error.filename}: " if error.filename else ""
            message, code = f"{where}{error.strerror or error}", PrecogError.exit_code
        except KeyboardInterrupt:
            message, code = "interrupted; run the same command to continue", Preempted.exit_code
        else:
            sys.exit(0)
        console.print(fitted(f"precog: {redacted(message)}"), markup=False)
        sys.exit(code)

    return run
