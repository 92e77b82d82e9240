"""The one command: `precog precompute | train | sample | cache | ...`. Stages are imported when they are asked for."""

import sys

import typer

from precompute.cli import app as precompute_app
from precompute.cli import cache_app
from sample.cli import app as sample_app
from train.cli import app as train_app
from train.doctor_cli import app as doctor_app
from train.memory_cli import app as memory_app

app = typer.Typer(
    name="precog",
    help="Fine-tune CogVideoX with LoRA: encode every video and caption once, then train only the transformer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for stage in (precompute_app, train_app, doctor_app, memory_app, sample_app):
    app.registered_commands += stage.registered_commands
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Entry point of the `precog` script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
