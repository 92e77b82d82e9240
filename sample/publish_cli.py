"""Commands `precog export` and `precog push`; heavy imports sit inside the commands."""

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


@app.command("push")
@exits
def push_command(
    run: RunFolder,
    repository: Annotated[str, typer.Argument(help="Repository on the hub: user/name.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only write the folder that would be uploaded.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    with_captions: Annotated[bool, typer.Option("--with-captions", help="Also upload the captions.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Upload a run's adapter to the hub with a model card; the same command continues an interrupted upload."""
    from shared.console import quiet_libraries, say

    quiet_libraries()
    from sample.hub import push

    result = push(run, repository, dry_run=dry_run, public=public, with_captions=with_captions)
    for value in result.values():
        say(value)
    if json_output:
        typer.echo(json.dumps(result))
