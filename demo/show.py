"""Join the sheets of `precog sample` into one image, and say where to look: `.venv/bin/python demo/show.py CONFIG`.

The last part of `make demo`.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from shared.config_file import load_config
from shared.run_folder import read_metrics

LABEL_PIXELS = 16
LOOK = {
    "demo": (
        'Look at the rows "zorp": without the LoRA (base) a spot of one color; with it (lora) a shape that is blue on '
        "the left, yellow on the right, and shrinks and grows again. The other rows keep color and movement."
    ),
    "demo-real": "Look at the two rows of a prompt: eight clips and 60 steps change the colors, not more.",
}


def join(sheets: list[tuple[str, Path]]) -> Image.Image:
    """Return the images one below the other, each under its prompt."""
    images = [(prompt, Image.open(path)) for prompt, path in sheets]
    height = sum(LABEL_PIXELS + image.height for _, image in images)
    joined = Image.new("RGB", (max(image.width for _, image in images), height), "white")
    top = 0
    for prompt, image in images:
        ImageDraw.Draw(joined).text((2, top + 3), f'"{prompt}"', fill="black")
        joined.paste(image, (0, top + LABEL_PIXELS))
        top += LABEL_PIXELS + image.height
    return joined


def main(path: Path) -> None:
    config = load_config(path)
    folder, run = config.sample.output_dir, config.train.output_dir
    sheets = [(prompt, next(folder.glob(f"{number:02}-*.png"))) for number, prompt in enumerate(config.sample.prompts)]
    joined = run / "before-after.png"
    join(sheets).save(joined)
    last = [line for line in read_metrics(run) if "held_out_loss" in line][-1]
    base = next(line["base_held_out_loss"] for line in read_metrics(run) if "base_held_out_loss" in line)
    print(f"\n{joined}\n  {LOOK.get(config.data.name, '')}")
    print(f"  Loss on clips kept out of training: {base:.3f} without the LoRA, {last['held_out_loss']:.3f} with it.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
