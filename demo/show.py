"""Say where to look on the contact sheet of `precog sample`: `.venv/bin/python demo/show.py CONFIG`.

The last part of `make demo`.
"""

import sys
from pathlib import Path

from shared.config_file import load_config
from shared.run_folder import SHEET, read_metrics

LOOK = {
    "demo": (
        'Look at the rows "zorp": without the LoRA (base) a spot of one color; with it (lora) a shape that is blue on '
        "the left, yellow on the right, and shrinks and grows again. The other rows keep color and movement."
    ),
    "demo-real": "Look at the two rows of a prompt: eight clips and 60 steps change the colors, not more.",
}


def main(path: Path) -> None:
    config = load_config(path)
    run = config.train.output_dir
    last = [line for line in read_metrics(run) if "held_out_loss" in line][-1]
    base = next(line["base_held_out_loss"] for line in read_metrics(run) if "base_held_out_loss" in line)
    print(f"\n{config.sample.output_dir / SHEET}\n  {LOOK.get(config.data.name, '')}")
    print(f"  Loss on clips kept out of training: {base:.3f} without the LoRA, {last['held_out_loss']:.3f} with it.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
