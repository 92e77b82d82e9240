"""`precog train | sweep | doctor`. Everything heavy is imported inside the command."""

from typing import Annotated

import typer

from shared.command import ConfigFile, JsonOutput, Overrides, exits

app = typer.Typer()


@app.command("train")
@exits
def train_command(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a LoRA from the cache; the same command resumes."""
    from shared.config import load_config
    from shared.console import quiet_libraries, show_config
    from shared.signals import StopSignal
    from train.loop import train

    settings = load_config(config, overrides)
    quiet_libraries()
    show_config(settings)
    with StopSignal() as stop:
        train(settings, stop)


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

    from shared.errors import PrecogError, UsageError
    from shared.signals import StopSignal
    from train.sweep import CSV_NAME, plan_sweep, run_sweep, show_rows

    if not grid:
        raise UsageError("--grid: not found; add --grid table.field=value,value")
    runs = plan_sweep(config, overrides or [], grid)
    with StopSignal() as stop:
        rows = run_sweep(config, runs, jobs, stop)
    path = runs[0].folder.parent / CSV_NAME
    show_rows(rows, path)
    if json_output:
        print(json.dumps({"csv": str(path), "runs": rows}))  # noqa: T201
    if failed := [run.folder for run in runs for row in rows if row["run"] == run.name and row["status"] != "finished"]:
        log = failed[0] / "log.txt"
        raise PrecogError(f"{len(failed)} of {len(runs)} runs failed; read {log}, then run the same command again")


@app.command("doctor")
@exits
def doctor_command(
    config: ConfigFile,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also load the transformer and measure competing conventions.")
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """Check checkpoint, config and cache against each other before training."""
    import json

    from shared.config import load_config
    from shared.console import quiet_libraries, say, table
    from train.doctor import examine
    from train.measure import measure as measure_conventions

    quiet_libraries()
    settings = load_config(config, overrides)
    diagnosis, subject = examine(settings)
    table(f"Conventions of {settings.model.pretrained_model_name_or_path}", diagnosis.facts)
    measured = None
    if measure and subject is not None and not diagnosis.errors:
        measured = measure_conventions(subject)
        if measured is None:
            say("Nothing to measure: this checkpoint has neither an image condition nor padded frames.")
        else:
            table("Loss of the base model", [(name, f"{mean:.6f}") for name, mean in measured.means.items()])
            diagnosis.warnings += [measured.warning] if measured.warning else []
    for error in diagnosis.errors:
        say(f"wrong: {error}")
    for warning in diagnosis.warnings:
        say(f"warning: {warning}")
    if json_output:
        found = {
            "facts": dict(diagnosis.facts),
            "errors": [str(error) for error in diagnosis.errors],
            "warnings": diagnosis.warnings,
            "measured": measured.means if measured else {},
        }
        print(json.dumps(found))  # noqa: T201
    if diagnosis.errors:
        count = len(diagnosis.errors)
        raise type(diagnosis.errors[0])(
            f"doctor: {count} {'thing' if count == 1 else 'things'} to mend before training"
        )
    say("doctor: nothing is wrong" if not diagnosis.warnings else "doctor: nothing that stops a run is wrong")
