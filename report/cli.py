"""Command `precog report`; heavy imports sit inside the command."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.command import ConfigFile, JsonOutput, Overrides, exits

if TYPE_CHECKING:
    from shared.config import Config

app = typer.Typer(help="Write HTML pages about data sets, runs and samples.", no_args_is_help=True)


@app.command("run")
@exits
def report_run_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders (train.output_dir), or the folder of a sweep.")],
    json_output: JsonOutput = False,
) -> None:
    """Write report.html into each run folder; several runs, or those of a sweep, are also compared."""
    from report.comparison import is_sweep, read_sweep, write_comparison
    from report.run_page import RunSummary, read_run, write_run_page
    from shared.console import say

    summaries: list[RunSummary] = []
    failed: dict[str, str] = {}
    pages, where = list[Path](), runs[0].resolve().parent / "comparison.html"
    for folder in runs:
        if is_sweep(folder):
            found, reasons = read_sweep(folder)
            where = folder / "sweep.html"
            pages += [write_run_page(folder / run.name) for run in found]
        else:
            found, reasons = [read_run(folder)], {}
            pages.append(write_run_page(folder))
        summaries += found
        failed |= reasons
    if len(runs) > 1 or is_sweep(runs[0]):
        pages.append(write_comparison(where, summaries, failed))
    for summary in summaries:
        say(f"{summary.name}: {summary.verdict.sentence}")
    for page in pages:
        say(str(page))
    if json_output:
        typer.echo(json.dumps({"pages": [str(page) for page in pages], "runs": [one.as_json() for one in summaries]}))


@app.command("grid")
@exits
def report_grid_command(
    folder: Annotated[Path, typer.Argument(help="Folder of `precog sample` (sample.output_dir).")],
    json_output: JsonOutput = False,
) -> None:
    """Write grid.html into the folder: prompts down, base model and LoRAs across."""
    from report.grid_page import write_grid_page
    from shared.console import say

    page = write_grid_page(folder)
    say(str(page))
    if json_output:
        typer.echo(json.dumps({"page": str(page)}))


@app.command("data")
@exits
def report_data_command(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the page, else beside train.output_dir.")] = None,
    json_output: JsonOutput = False,
) -> None:
    """Write data.html about the precomputed clips: which to look at and why, crops, captions, duplicates."""
    from shared.config_file import load_config

    settings = load_config(config, overrides)
    from report.data_page import report_data
    from shared.console import say

    report, page = report_data(settings, output, str(config))
    say(f"{report.name}: {report.verdict}")
    say(str(page))
    if json_output:
        typer.echo(json.dumps({"page": str(page), **report.as_json()}))


def show_data_page(config: "Config", name: str) -> None:
    """Write the data page after stage 1, unless it shows the view already; a failure is one line."""
    from shared.console import say

    try:
        from report.data_page import is_current, page_folder, report_data

        if is_current(config):
            say(f"data page: {page_folder(config) / 'data.html'}")
            return
        report, page = report_data(config, name=name)
        say(f"data page: {page}: {report.verdict}")
    except Exception as error:
        say(f"data page: not written ({type(error).__name__}: {error}); `precog report data {name}` tries again")
