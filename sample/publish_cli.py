"""Command `precog export`; heavy imports sit inside the command."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.command import JsonOutput, exits

app = typer.Typer()

RunFolder = Annotated[Path, typer.Argument(help="Run folder (train.output_dir).")]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Format = Literal["diffusers", "comfyui", "merged", "peft"]


@app.command("export")
@exits
def export_command(
    run: RunFolder,
    form: Annotated[Format, typer.Option("--format", help="What loads the file.")] = "diffusers",
    step: Annotated[str, typer.Option(help="Optimizer step of a checkpoint; several (1,2,3) give the mean.")] = "",
    best: Annotated[bool, typer.Option("--best", help="The adapter of the lowest held-out loss.")] = False,
    precision: Annotated[Precision, typer.Option(help="auto: fp32, merged as the checkpoint.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder to write to; in RUN/exports by default.")] = None,
    json_output: JsonOutput = False,
) -> None:
    """Write a run's adapter for another program, also of a run that was stopped; files are read back and compared."""
    from shared.errors import UsageError

    steps = step.split(",") if step else []
    if best and steps:
        raise UsageError("--step: not together with --best; leave one out")
    if not all(number.isdecimal() for number in steps):
        raise UsageError(f"--step {step!r}: expected optimizer steps such as 400 or 300,350,400")
    from sample.export import export_run
    from shared.console import quiet_libraries, say

    quiet_libraries()
    numbers = [int(number) for number in steps]
    files = export_run(run, form, numbers, best=best, precision=precision, output=output)
    for file in files:
        say(str(file))
    if json_output:
        typer.echo(json.dumps({"files": [str(file) for file in files]}))
