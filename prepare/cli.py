"""`precog init`, `precog split` and `precog caption`. Everything heavy is imported inside the commands."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shared.command import ConfigFile, JsonOutput, Overrides, exits

if TYPE_CHECKING:
    from prepare.table import PrepareReport

MAX_LISTED = 20
"""Files that are listed; --json has all."""

app = typer.Typer()


@app.command("init")
@exits
def init_command(
    name: Annotated[str, typer.Argument(help="Name of the project: NAME.toml and NAME.jsonl are written.")],
    videos: Annotated[Path, typer.Option(help="Folder of videos, searched with its subfolders.")],
    model: Annotated[
        Literal["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"], typer.Option(help="CogVideoX checkpoint to train.")
    ],
    trigger: Annotated[str, typer.Option(help="Token put before every caption, such as 'sks dog'.")] = "",
    card: Annotated[str, typer.Option(help="GPU to train on: 4090, L40S, h100, or its memory, such as 24GiB.")] = "",
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Take links that lead out of the folder.")
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """Look at a folder of videos and write a config and a table; run again, it adds new videos to the table."""
    from prepare.project import init_project

    _show(init_project(name, videos, model, trigger, card, follow_links=follow_links), json_output)


@app.command("split")
@exits
def split_command(
    config: ConfigFile,
    overrides: Overrides = None,
    threshold: Annotated[float, typer.Option(help="PySceneDetect's threshold; higher finds fewer cuts.")] = 3.0,
    min_seconds: Annotated[
        float | None, typer.Option(min=0, help="Leave out shorter scenes; default: the length of the smallest bucket.")
    ] = None,
    max_scenes: Annotated[
        int | None, typer.Option(min=1, help="Keep this many scenes of a video, the longest.")
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Cut long videos at scene changes: rows with start_seconds and end_seconds, no video is encoded again."""
    from prepare.split import split_table
    from shared.config_file import load_config

    _show(split_table(load_config(config, overrides), threshold, min_seconds, max_scenes), json_output)


@app.command("caption")
@exits
def caption_command(
    config: ConfigFile,
    engine: Annotated[
        Literal["transformers", "openai"],
        typer.Option(help="A local model, or a server that speaks OpenAI's protocol."),
    ],
    model: Annotated[str, typer.Option(help="Vision-language model: hub name or folder, or the server's name for it.")],
    overrides: Overrides = None,
    url: Annotated[str | None, typer.Option(help="openai: the server, such as http://127.0.0.1:8000/v1.")] = None,
    frames: Annotated[int, typer.Option(min=1, max=128, help="Pictures of each clip that the model takes_images.")] = 8,
    rewrite: Annotated[str | None, typer.Option(help="Text model that rewrites each caption to 50-100 words.")] = None,
    tries: Annotated[int, typer.Option(min=1, max=10, help="openai: tries for one clip, with growing pauses.")] = 5,
    deadline_seconds: Annotated[float, typer.Option(min=0.1, help="openai: time to wait for the server.")] = 120,
    json_output: JsonOutput = False,
) -> None:
    """Fill the empty captions of the table; captions that are there stay. The key is read from OPENAI_API_KEY."""
    from prepare.caption import caption_table
    from prepare.engines import Ask, local_model, server
    from shared.config_file import load_config
    from shared.console import quiet_libraries
    from shared.errors import PrecogError

    settings = load_config(config, overrides)
    if engine == "transformers":
        quiet_libraries()

    def open_model(name: str, takes_images: bool) -> Ask:
        return (
            local_model(name, takes_images) if engine == "transformers" else server(name, url, tries, deadline_seconds)
        )

    report = caption_table(settings, open_model, model, frames, rewrite)
    _show(report, json_output)
    if report.unfinished:
        raise PrecogError(f"{report.unfinished} clips got no answer; the same command asks for those again")


def _show(report: "PrepareReport", json_output: bool) -> None:
    """Print what a command found: counts, reasons by file, notes; with `json_output` the whole report as one line."""
    from shared.console import say, table

    rows = [(name, len(found) if isinstance(found, list | dict) else found) for name, found in report.summary.items()]
    table(report.table, rows)
    for name, reason in list(report.files.items())[:MAX_LISTED]:
        say(f"{name!r}: {reason}")
    if len(report.files) > MAX_LISTED:
        say(f"... and {len(report.files) - MAX_LISTED} more; --json lists all")
    for note in [*(finding.message for finding in report.findings), *report.notes]:
        say(f"note: {note}")
    if json_output:
        typer.echo(json.dumps(asdict(report)))
