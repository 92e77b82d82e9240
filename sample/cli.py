"""`precog sample | decode`. Everything heavy is imported inside the command."""

from pathlib import Path

import typer

from shared.arguments import ConfigFile, Overrides

app = typer.Typer()


@app.command("sample")
def sample_command(config: ConfigFile, overrides: Overrides = None) -> None:
    """Make videos from the config's prompts, with and without the adapter, from the same noise."""
    from shared.console import run_command

    run_command(lambda: _sample(config, overrides or []))


@app.command("decode")
def decode_command(config: ConfigFile, overrides: Overrides = None) -> None:
    """Make videos of the previews that training saved as latents; only the VAE is loaded."""
    from shared.console import run_command

    run_command(lambda: _decode(config, overrides or []))


def _sample(path: Path, overrides: list[str]) -> None:
    from sample.generate import sample
    from shared.config import load_config
    from shared.console import quiet_libraries, show_config

    config = load_config(path, overrides)
    quiet_libraries()
    show_config(config)
    sample(config)


def _decode(path: Path, overrides: list[str]) -> None:
    from sample.decode import decode
    from shared.config import load_config
    from shared.console import quiet_libraries

    config = load_config(path, overrides)
    quiet_libraries()
    decode(config)
