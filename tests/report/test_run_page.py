"""The pages of runs and sweeps, some in a real browser; failures and missing values."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from typer.testing import CliRunner

from precog import app
from report.run_page import write_run_page
from shared.run_folder import add_event
from tests.report.browser import HOSTILE, WIDTHS, fits, num_marks, opened, tab_stops
from tests.report.made_runs import GAINS, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

START = {"step": 0, "device": "CPU, 2 cores", "processes": 1, "versions": {"torch": "2.13"}, "view": HOSTILE}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run with events, filmstrips of the six held-out clips and two previews of a prompt."""
    folder = write_run(tmp_path / f"run {HOSTILE[-20:]}")
    add_event(folder, "started", **START)
    add_event(folder, "stopped", reason="by a signal")
    add_event(folder, "resumed", **START | {"step": 20})
    for step in (10, 20):
        previews = folder / "previews" / f"step-{step:06}"
        previews.mkdir(parents=True)
        (previews / "00.json").write_text(json.dumps({"prompt": HOSTILE, "step": step}), "utf-8")
        Image.new("RGB", (12, 8), "blue").save(previews / "00.webp")
    (folder / "held-out").mkdir()
    Image.new("RGB", (6 * 96, 6 * 64), "blue").save(folder / "held-out" / "strips-000.webp")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Make a sweep of two runs that finished and one that failed before its first step."""
    folder = tmp_path / "sweep"
    for rank in (4, 16):
        write_run(folder / f"rank={rank}", [gain * rank / 16 for gain in GAINS], rank=rank)
    with (folder / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [(f"rank={rank}", rank, "finished" if rank < 64 else HOSTILE[-40:]) for rank in (4, 16, 64)]
        csv.writer(file).writerows([("run", "train.lora_rank", "status"), *rows])
    return folder


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(400, True), (1280, False)])
def test_run_page_is_drawn_offline(width: int, dark: bool, browser: "Browser", run: Path) -> None:
    with opened(browser, write_run_page(run), width=width, dark=dark) as page:
        box = page.locator(".verdict").bounding_box()
        assert box is not None and box["y"] < 200 and page.locator(".verdict").inner_text().startswith("Learning")
        assert num_marks(page, "symbol") >= len(GAINS) * 6, "the loss and five quantiles"
        assert num_marks(page, "line") >= 14
        assert fits(page)
        assert page.get_by_text(f"0 {HOSTILE}").is_visible()
        shown = "[...document.querySelectorAll('.gallery img')].filter(image => image.naturalWidth === 12).length"
        assert page.evaluate(shown) == 2
        strip = page.locator(".strip").first  # of the worst clip, the last of six
        assert strip.evaluate("e => getComputedStyle(e).backgroundPositionY") == f"-{5 * 64}px"
        strip.hover()
        assert strip.evaluate("e => getComputedStyle(e).animationName") == "play"
        stops = tab_stops(page)
        assert stops[0] == "How the verdict is made" and len(stops) == 12, "the rule, five tables, six films"


@pytest.mark.browser
def test_sweep_page_ranks_runs_and_names_failures(browser: "Browser", sweep: Path) -> None:
    done = CliRunner().invoke(app, ["report", "run", str(sweep), "--json"])
    assert done.exit_code == 0, done.output
    pages = json.loads(done.stdout)["pages"]
    assert pages == [str(sweep / name) for name in ("rank=4/report.html", "rank=16/report.html", "sweep.html")]
    for width in WIDTHS:
        with opened(browser, sweep / "sweep.html", width=width) as page:
            assert page.locator(".verdict").inner_text().startswith("Best: rank=16. Learning")
            assert page.locator("pre").inner_text() == f"precog sample {sweep}/rank=16/config.toml"
            assert num_marks(page, "symbol") == 2 * 2 * len(GAINS) and num_marks(page, "area") == 2
            assert fits(page)
            cells = page.locator("table").first.locator("tr").nth(1).locator("td").all_inner_texts()
            assert cells[0] == "rank=16" and cells[6] == "", "GPU hours are empty on a CPU"
            assert page.get_by_text(HOSTILE[-40:]).is_visible()
            assert page.get_by_text("train.lora_rank").count() == 2


def test_same_run_gives_the_same_bytes_and_a_curve(run: Path) -> None:
    assert write_run_page(run).read_bytes() == write_run_page(run).read_bytes()
    with Image.open(run / "loss.png") as image:
        assert image.width > 600 and len(image.getcolors(1 << 20) or []) > 2


def test_page_numbers_are_those_of_json_and_missing_is_no_zero(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "judged"), write_run(tmp_path / "plain", every=30, gains=(0.1,))]
    (runs[1] / "metrics.jsonl").write_text(
        "".join(text + "\n" for text in (runs[1] / "metrics.jsonl").read_text().splitlines()[:-1])
    )
    done = CliRunner().invoke(app, ["report", "run", *map(str, runs), "--json"])
    judged, plain = json.loads(done.stdout)["runs"]
    assert f"{judged['held_out'][-1]['loss']:.4f}" in (runs[0] / "report.html").read_text("utf-8")
    assert plain["verdict"]["gain"] is None and plain["gpu_hours"] is None and plain["base"] is None
    assert plain["verdict"]["kind"] == "not evaluated"
    assert "0.0000" not in (tmp_path / "comparison.html").read_text("utf-8").partition("<script>")[0]
