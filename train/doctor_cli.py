"""`precog doctor`. Everything heavy is imported inside the command."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("doctor")
def doctor_command(
    config: Annotated[Path, typer.Argument(help="TOML file of the experiment.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="table.field=value ...", metavar="[TABLE.FIELD=VALUE]...")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also load the transformer and measure competing conventions.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="End with one JSON line on standard output.")] = False,
) -> None:
    """Check checkpoint, config and cache against each other before training."""
    from shared.console import run_command

    run_command(lambda: _doctor(config, overrides or [], measure, json_output))


def _doctor(path: Path, overrides: list[str], measuring: bool, json_output: bool) -> None:
    import json

    from shared.config import load_config
    from shared.console import quiet_libraries, say, table
    from train.doctor import examine
    from train.measure import measure

    quiet_libraries()
    config = load_config(path, overrides)
    diagnosis, subject = examine(config)
    table(f"Conventions of {config.model.pretrained_model_name_or_path}", diagnosis.facts)
    measured = None
    if measuring and subject is not None and not diagnosis.errors:
        measured = measure(subject)
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
        print(  # noqa: T201
            json.dumps(
                {
                    "facts": dict(diagnosis.facts),
                    "errors": [str(error) for error in diagnosis.errors],
                    "warnings": diagnosis.warnings,
                    "measured": measured.means if measured else {},
                }
            )
        )
    if diagnosis.errors:
        count = len(diagnosis.errors)
        raise type(diagnosis.errors[0])(
            f"doctor: {count} {'thing' if count == 1 else 'things'} to mend before training"
        )
    say("doctor: nothing is wrong" if not diagnosis.warnings else "doctor: nothing that stops a run is wrong")
