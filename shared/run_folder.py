"""What training leaves in a run folder for other commands to read."""

from pathlib import Path

EXPORT = "export"
"""The folder of the finished adapter."""
ADAPTER = "pytorch_lora_weights.safetensors"
"""Its file, by the name that diffusers' `load_lora_weights` looks for (`diffusers/loaders/lora_base.py`)."""
PREVIEWS = "previews"
"""The folder of the previews; below it `step-000100/00.safetensors` and `.json`, and what `precog decode` adds."""
SHEET = "sheet.png"
"""What `precog decode` writes last into a step's folder: one that has it is done, the tracker included."""


def adapter_file(place: Path) -> Path:
    """The adapter in an export folder, or the file itself; it need not exist."""
    return place / ADAPTER if place.is_dir() else place


def preview_folder(run: Path, step: int) -> Path:
    """Where the previews of an optimizer step go."""
    return run / PREVIEWS / f"step-{step:06}"


def preview_file(run: Path, step: int, number: int) -> Path:
    """The latents of one prompt, by its number among the step's."""
    return preview_folder(run, step) / f"{number:02}.safetensors"
