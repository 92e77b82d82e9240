"""`precog train | sweep`. Heavy modules are imported inside the commands, after the config is checked."""

from typing import Annotated

import typer

from shared.command import ConfigFile, JsonOutput, Overrides, exits

app = typer.Typer()


@app.command("train")
@exits
def train_command(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open everything, measure a few steps, and write nothing.")
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """Train a LoRA from the cache; the same command resumes."""
    from shared.config import load_config
    from shared.errors import UsageError
    from shared.signals import StopSignal

    if json_output and not dry_run:
        raise UsageError("--json: not without --dry-run; a run writes metrics.jsonl")
    settings = load_config(config, overrides)
    with StopSignal() as stop:
        from shared.console import quiet_libraries, show_config

        quiet_libraries()
        show_config(settings)
        if not dry_run:
            from train.loop import train

            train(settings, stop)
            return
    import json
    from dataclasses import asdict

    from train.dry_run import dry_run as measure
    from train.dry_run import show

    result = measure(settings)
    show(result)
    if json_output:
        print(json.dumps(asdict(result)))  # noqa: T201


@app.command("sweep")
@exits
def sweep_command(
    config: ConfigFile,
    overrides: Overrides = None,
    grid: Annotated[
        list[str] | None, typer.Option(help="table.field=value,value ...; several make all combinations.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, dealt out over the GPUs.")] = 1,
) -> None:
    """Train one LoRA per combination of settings, all from one cache; the same command resumes."""
    from shared.errors import UsageError
    from shared.signals import StopSignal
    from train.sweep import CSV_NAME, plan_sweep, run_sweep, show_outcomes

    if not grid:
        raise UsageError("nothing to vary: add --grid table.field=value,value")
    runs = plan_sweep(config, overrides or [], grid)
    with StopSignal() as stop:
        outcomes = run_sweep(config, runs, jobs, stop)
    show_outcomes(outcomes, runs[0].folder.parent / CSV_NAME)
