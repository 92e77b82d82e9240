"""`precog train` and `precog sweep`. Everything heavy is imported inside the command."""

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


@app.command("sweep")
def sweep_command(
    config: Annotated[Path, typer.Argument(help="TOML file of the experiment.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="table.field=value ...", metavar="[TABLE.FIELD=VALUE]...")
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(help="table.field=value,value ...; several make all combinations.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, dealt out over the GPUs.")] = 1,
) -> None:
    """Train one LoRA per combination of settings, all from one cache; the same command resumes."""
    from shared.console import run_command

    run_command(lambda: _sweep(config, overrides or [], grid or [], jobs))


def _sweep(path: Path, overrides: list[str], grid: list[str], jobs: int) -> None:
    from shared.errors import UsageError
    from shared.preemption import StopSignal
    from train.sweep import CSV_NAME, plan_sweep, run_sweep, show_outcomes

    if not grid:
        raise UsageError("nothing to vary: add --grid table.field=value,value")
    runs = plan_sweep(path, overrides, grid)
    with StopSignal() as stop:
        outcomes = run_sweep(path, runs, jobs, stop)
    show_outcomes(outcomes, runs[0].folder.parent / CSV_NAME)


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
