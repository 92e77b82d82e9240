"""Commands `precog sample` and `precog decode`; heavy imports sit inside the commands."""

import json
from pathlib import Path
from typing import Annotated

import typer

from shared.command import ConfigFile, JsonOutput, Overrides, exits
from shared.signals import raise_on_signal

app = typer.Typer()


@app.command("sample")
@exits
def sample_command(
    config: ConfigFile,
    overrides: Overrides = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="RUN[@step|@best][:strength] or a file; instead of sample.loras.")
    ] = None,
    video: Annotated[Path | None, typer.Option("--input", help="Video to start from: sample.video.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far from --input: sample.strength.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Compare the LoRAs one by one with the base model.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Make videos from the config's prompts, with and without LoRAs, from the same noise; the same command resumes."""
    from shared.config_file import load_config

    given = list(overrides or [])
    if lora:
        given.append(f"sample.loras=[{', '.join(map(lora_override, lora))}]")
    if video is not None:
        given.append(f"sample.video={json.dumps(str(video), ensure_ascii=False)}")
    if strength is not None:
        given.append(f"sample.strength={strength}")
    settings = load_config(config, given)  # refused before torch is imported
    with raise_on_signal("finished videos are kept"):
        from sample.generate import sample
        from shared.console import quiet_libraries, show_config

        quiet_libraries()
        show_config(settings)
        made = sample(settings, grid=grid)
    if json_output:
        typer.echo(json.dumps(made))


def lora_override(text: str) -> str:
    """Return the TOML of one --lora: RUN[@step|@best][:strength]."""
    path, _, strength = text.rpartition(":")
    try:
        factor = f", strength = {float(strength)}"
    except ValueError:
        path, factor = text, ""
    return f"{{path = {json.dumps(path, ensure_ascii=False)}{factor}}}"


@app.command("decode")
@exits
def decode_command(config: ConfigFile, overrides: Overrides = None, json_output: JsonOutput = False) -> None:
    """Make videos of the previews that training saved as latents; only the VAE is loaded."""
    from shared.config_file import load_config

    settings = load_config(config, overrides)  # refused before torch is imported
    with raise_on_signal("finished videos are kept"):
        from sample.decode import decode
        from shared.console import quiet_libraries

        quiet_libraries()
        written = decode(settings)
    if json_output:
        typer.echo(json.dumps([str(path) for path in written]))
