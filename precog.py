"""The one command: `precog precompute | plan | train | sample | cache | ...`. Stages are imported when asked for."""

import sys
from typing import Annotated

import typer

from precompute.cli import app as precompute_app
from precompute.cli import cache_app, show_plan
from prepare.cli import app as prepare_app
from sample.cli import app as sample_app
from shared.command import ConfigFile, JsonOutput, Overrides, exits
from train.cli import app as train_app

app = typer.Typer(
    name="precog",
    help="Fine-tune CogVideoX with LoRA: encode every video and caption once, then train only the transformer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for stage in (prepare_app, precompute_app, train_app, sample_app):
    app.registered_commands += stage.registered_commands
app.add_typer(cache_app, name="cache")


@app.command("plan")
@exits
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
    import json

    from shared.config import load_config
    from shared.console import quiet_libraries

    settings = load_config(config, overrides)
    if calibrate or card:
        quiet_libraries()
    if not card:
        planned = show_plan(settings, calibrated=calibrate) | {"train": None}
    else:
        from shared.errors import DataError
        from train.memory.outlook import find_card, foresee, show

        gpu = find_card(card)
        try:
            planned = show_plan(settings, calibrated=calibrate)
        except DataError:  # what training takes is worth knowing before there are clips
            show(foresee(settings, gpu))
            raise
        outlook = foresee(settings, gpu)
        show(outlook)
        planned["train"] = outlook.as_json()
    if json_output:
        print(json.dumps(planned))  # noqa: T201


def main() -> None:
    """Entry point of the `precog` script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
