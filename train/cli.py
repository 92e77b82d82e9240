"""`precog train | sweep`. Heavy modules are imported inside the commands, after the config is checked."""

import os
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
    import json

    from shared.config_file import load_config
    from shared.signals import StopSignal

    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read by torch when CUDA starts
    settings = load_config(config, overrides)
    with StopSignal() as stop:
        from shared.console import quiet_libraries, show_config

        quiet_libraries()
        show_config(settings)
        if not dry_run:
            from train.loop import train
            from train.metrics import run_result

            train(settings, stop)
            if json_output:
                print(json.dumps(run_result(settings.train.output_dir)))  # noqa: T201
            return
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
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, assigned to the GPUs in turn.")] = 1,
    json_output: JsonOutput = False,
) -> None:
    """Train one LoRA per combination of settings on one cache; the same command resumes."""
    import json

    from shared.config_file import load_config
    from shared.errors import PrecogError, UsageError
    from shared.signals import StopSignal

    if not grid:
        raise UsageError("--grid: not found; add --grid table.field=value,value")
    load_config(config, overrides)  # a wrong key is refused before torch is imported
    with StopSignal() as stop:
        from train.sweep import CSV_NAME, plan_sweep, run_sweep, show_rows

        runs = plan_sweep(config, overrides or [], grid)
        rows = run_sweep(config, runs, jobs, stop)
    path = runs[0].folder.parent / CSV_NAME
    show_rows(rows, path)
    if json_output:
        print(json.dumps({"csv": str(path), "runs": rows}))  # noqa: T201
    if failed := [run.folder for run in runs for row in rows if row["run"] == run.name and row["status"] != "finished"]:
        log = failed[0] / "log.txt"
        raise PrecogError(f"{len(failed)} of {len(runs)} runs failed; read {log}, then run the same command again")
