"""The page of a run in a real browser."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from report.run_page import write_run_page
from tests.report.browser import HOSTILE, WIDTHS, fits, num_marks, opened, tab_stops
from tests.report.made_runs import GAINS, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_run_page_is_drawn_offline(width: int, dark: bool, browser: "Browser", tmp_path: Path) -> None:
    page_file = write_run_page(write_run(tmp_path / f"run {HOSTILE[-20:]}"))
    with opened(browser, page_file, width=width, dark=dark) as page:
        assert page.locator(".verdict").inner_text().startswith("Learning")
        assert page.locator(".verdict").bounding_box()["y"] < 200  # type: ignore[index]
        assert num_marks(page, "symbol") >= len(GAINS) * 6  # the loss and five quantiles
        assert num_marks(page, "line") >= 14
        assert fits(page)
        assert page.get_by_text(f"0 {HOSTILE}").is_visible()
        assert tab_stops(page)[0] == "How the verdict is made"


def test_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert write_run_page(run).read_bytes() == write_run_page(run).read_bytes()
