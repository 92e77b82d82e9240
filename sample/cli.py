"""Commands `precog sample` and `precog decode`; heavy imports sit inside the commands."""

import typer

from shared.command import ConfigFile, Overrides, exits

app = typer.Typer()


@app.command("sample")
@exits
def sample_command(config: ConfigFile, overrides: Overrides = None) -> None:
    """Make videos from the config's prompts, with and without the adapter, from the same noise."""
    from shared.config_file import load_config

    settings = load_config(config, overrides)  # refused before torch is imported
    from sample.generate import sample
    from shared.console import quiet_libraries, show_config

    quiet_libraries()
    show_config(settings)
    sample(settings)


@app.command("decode")
@exits
def decode_command(config: ConfigFile, overrides: Overrides = None) -> None:
    """Make videos of the previews that training saved as latents; only the VAE is loaded."""
    from shared.config_file import load_config

    settings = load_config(config, overrides)  # refused before torch is imported
    from sample.decode import decode
    from shared.console import quiet_libraries

    quiet_libraries()
    decode(settings)
