"""Names of what training leaves in a run folder for other commands to read."""

from pathlib import Path

EXPORT = "export"
"""Folder of the finished adapter."""
BEST = "best"
"""Folder in the export with the adapter of the lowest held-out loss so far."""
ADAPTER = "pytorch_lora_weights.safetensors"
"""File that diffusers' `load_lora_weights` looks for (`diffusers/loaders/lora_base.py`)."""
PREVIEWS = "previews"
"""Folder of previews: `step-000100/00.safetensors` and `.json`, and the images of `precog decode`."""
SHEET = "sheet.png"
"""File that `precog decode` writes last into a step's folder; a folder that has it is decoded."""


def adapter_file(place: Path) -> Path:
    """Return the adapter in an export folder, or `place` itself if it is a file; neither need exist."""
    return place / ADAPTER if place.is_dir() else place


def preview_folder(run: Path, step: int) -> Path:
    """Return the folder of an optimizer step's previews."""
    return run / PREVIEWS / f"step-{step:06}"


def preview_file(run: Path, step: int, number: int) -> Path:
    """Return the file with the latents of a step's prompt `number`."""
    return preview_folder(run, step) / f"{number:02}.safetensors"
