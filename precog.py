"""The `precog` command: one typer app per package. Each command imports its stage when it runs."""

import sys
from typing import Annotated

import typer

import precompute.cli
from precompute.cache_cli import cache_app
from precompute.cli import app as precompute_app
from precompute.cli import show_plan
from prepare.cli import app as prepare_app
from report.cli import app as report_app
from report.cli import show_data_page
from sample.cli import app as sample_app
from sample.publish_cli import app as publish_app
from shared.command import ConfigFile, JsonOutput, Overrides, exits
from shared.errors import UsageError
from shared.redaction import HAS_SECRET, redacted
from shared.signals import raise_on_signal
from train.cli import app as train_app

__version__ = "0.1.0"

app = typer.Typer(name="precog", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
for stage in (prepare_app, precompute_app, train_app, sample_app, publish_app):
    app.registered_commands += stage.registered_commands
app.add_typer(cache_app, name="cache")
app.add_typer(report_app, name="report")
precompute.cli.show_page = show_data_page


def show_version(wanted: bool) -> None:
    """Print the version and exit, if it is asked for."""
    if wanted:
        typer.echo(f"precog {__version__}")
        raise typer.Exit


@app.callback()
def precog(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune CogVideoX with LoRA: encode every video and caption once, then train only the transformer."""


@app.command("config")
@exits
def config_command(config: ConfigFile, overrides: Overrides = None, json_output: JsonOutput = False) -> None:
    """Print the resolved config as TOML, or as one JSON line."""
    from shared.config_file import dump_config, load_config

    found = load_config(config, overrides)
    typer.echo(found.model_dump_json() + "\n" if json_output else dump_config(found), nl=False)


@app.command("plan")
@exits
def plan_command(
    config: ConfigFile,
    overrides: Overrides = None,
    card: Annotated[str, typer.Option(help="Also estimate training on this GPU, such as 4090, h100 or 24GiB.")] = "",
    json_output: JsonOutput = False,
) -> None:
    """Show what `precompute` would do, and with --card what `train` would take; write nothing."""
    import json
    from dataclasses import asdict

    with raise_on_signal("nothing was written"):
        from shared.cards import find_card
        from shared.config_file import load_config
        from shared.console import quiet_libraries

        settings = load_config(config, overrides)
        cost = None
        if card:
            from train.memory.cost import show_cost, training_cost

            gpu = find_card(card)
            quiet_libraries()
            cost = training_cost(settings, gpu)
            show_cost(cost)  # worth knowing even before there are clips
        planned = show_plan(settings) | {"train": asdict(cost) if cost else None}
    if json_output:
        typer.echo(json.dumps(planned))


def main() -> None:
    """Run the `precog` script; words with a secret are refused before anything shows them."""
    for word in sys.argv[1:]:
        if redacted(word) != word:
            typer.echo(f"precog: {redacted(word)}: {HAS_SECRET}", err=True)
            sys.exit(UsageError.exit_code)
    sys.exit(app(prog_name="precog"))


if __name__ == "__main__":
    main()
