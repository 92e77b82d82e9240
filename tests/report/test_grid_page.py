"""The page of a folder of samples, also in a real browser."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from report.grid_page import read_grid, write_grid_page
from sample.loras import Lora, lines_that_load
from shared.errors import UsageError
from shared.video import write_mp4
from tests.report.browser import HOSTILE, WIDTHS, fits, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def write_samples(folder: Path, labels: tuple[str, ...] = ("base", "a x0.5", "a x1")) -> None:
    """Write two rows of videos and their records, as `precog sample --grid` does."""
    folder.mkdir()
    for number, prompt in enumerate(("a zorp on snow", HOSTILE)):
        for column, label in enumerate(labels):
            path = folder / f"{number}-{column}.mp4"
            write_mp4(path, np.full((9, 32, 48, 3), 40 * column, np.uint8), 8)
            lora = Lora(label, "lora0", Path("runs/a@best"), Path("runs/a/export/best/x.safetensors"), column / 2, "")
            body = {"video": path.name, "label": label, "prompt": prompt, "seed": 7, "distance": column / 10}
            body |= {"saturation": 0.2 + column / 10, "motion": 0.1, "load": lines_that_load([lora] if column else [])}
            body["recipe"] = {"guidance_scale": 6, "loras": [column]}
            path.with_suffix(".json").write_text(json.dumps(body), "utf-8")


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_grid_page_plays_offline(width: int, browser: "Browser", tmp_path: Path) -> None:
    write_samples(tmp_path / "samples")
    with opened(browser, write_grid_page(tmp_path / "samples"), width=width) as page:
        assert page.locator("video").count() == 6
        page.wait_for_function("[...document.querySelectorAll('video')].every(video => video.videoWidth === 48)")
        assert fits(page) and page.get_by_text(HOSTILE).first.is_visible()
        page.locator("summary").first.click()
        lines: list[Any] = page.locator("details[open] pre").all_inner_texts()
    assert lines[0].startswith("pipe.load_lora_weights(") and lines[0].endswith('set_adapters(["lora0"], [0.5])')
    node = 'LoraLoaderModelOnly, lora_name = "a.safetensors", strength_model = 0.5'
    assert lines[1] == f"precog export runs/a --best --format comfyui; {node}"


def test_grid_shows_drift_and_leaves_other_settings_out(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    write_samples(folder)
    (folder / "notes.json").write_text("[]", "utf-8")
    (folder / "1-2.mp4").unlink()
    record = json.loads((folder / "0-2.json").read_text("utf-8"))
    record["recipe"]["guidance_scale"] = 1
    (folder / "0-2.json").write_text(json.dumps(record), "utf-8")
    labels, rows, left_out = read_grid(folder)
    assert labels == ["base", "a x0.5"] and [list(row) for row in rows] == [labels, labels] and left_out == 1
    assert rows[0]["a x0.5"]["saturation_drift"] == pytest.approx(0.5) and rows[0]["a x0.5"]["motion_drift"] == 0
    assert write_grid_page(folder).read_bytes() == write_grid_page(folder).read_bytes()
    with pytest.raises(UsageError, match=r"no videos of `precog sample` found; give its sample\.output_dir"):
        write_grid_page(tmp_path)
