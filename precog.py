"""The one command: `precog precompute | plan | train | sample | cache | ...`. Stages are imported when asked for."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from precompute.cli import app as precompute_app
from precompute.cli import cache_app, show_plan
from sample.cli import app as sample_app
from shared.arguments import ConfigFile, JsonOutput, Overrides
from train.cli import app as train_app

app = typer.Typer(
    name="precog",
    help="Fine-tune CogVideoX with LoRA: encode every video and caption once, then train only the transformer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for stage in (precompute_app, train_app, sample_app):
    app.registered_commands += stage.registered_commands
app.add_typer(cache_app, name="cache")


@app.command("plan")
def plan_command(
    config: ConfigFile,
    overrides: Overrides = None,
    card: Annotated[
        str, typer.Option(help="Also what training takes on this GPU: h100, a100, 4090, or its memory in GiB.")
    ] = "",
    calibrate: Annotated[bool, typer.Option(help="Encode two clips and a batch of prompts to estimate hours.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Say what `precompute` would do, and with --card what `train` would take; nothing is written."""
    from shared.console import run_command

    run_command(lambda: _plan(config, overrides or [], card, calibrate, json_output))


def _plan(path: Path, overrides: list[str], card: str, calibrate: bool, json_output: bool) -> None:
    import json

    from shared.config import load_config
    from shared.console import quiet_libraries

    config = load_config(path, overrides)
    if calibrate or card:
        quiet_libraries()
    if not card:
        planned = show_plan(config, calibrated=calibrate) | {"train": None}
    else:
        from shared.errors import DataError
        from train.outlook import find_card, foresee, show

        gpu = find_card(card)
        try:
            planned = show_plan(config, calibrated=calibrate)
        except DataError:  # what training takes is worth knowing before there are clips
            show(foresee(config, gpu))
            raise
        outlook = foresee(config, gpu)
        show(outlook)
        planned["train"] = outlook.as_json()
    if json_output:
        print(json.dumps(planned))  # noqa: T201


def main() -> None:
    """Entry point of the `precog` script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
