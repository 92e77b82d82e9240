"""`precog train`. Everything heavy is imported inside the command."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("train")
def train_command(
    config: Annotated[Path, typer.Argument(help="TOML file of the experiment.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="table.field=value ...", metavar="[TABLE.FIELD=VALUE]...")
    ] = None,
) -> None:
    """Train a LoRA from the cache; the same command resumes."""
    from shared.console import run_command

    run_command(lambda: _train(config, overrides or []))


def _train(path: Path, overrides: list[str]) -> None:
    from shared.config import load_config
    from shared.console import quiet_libraries, show_config
    from shared.preemption import StopSignal
    from train.loop import train

    config = load_config(path, overrides)
    quiet_libraries()
    show_config(config)
    with StopSignal() as stop:
        train(config, stop)
