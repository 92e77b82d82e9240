"""What commands take, written once; imports nothing heavy."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="TOML file of the experiment.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="table.field=value ...", metavar="[TABLE.FIELD=VALUE]...")]
JsonOutput = Annotated[bool, typer.Option("--json", help="End with one JSON line on standard output.")]
