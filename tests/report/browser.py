"""A page in headless Chromium: errors, requests, marks of charts, tab order, screenshots.

The tests use the fixture `browser` of tests/conftest.py and carry the mark `browser`.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (400, 1280)
"""Pixels at which a page must be legible."""
HOSTILE = "</script><script>window.hostile = 1</script><img src=x onerror='window.hostile = 1'>\"'&{{ 7 * 7 }}\u202etxt"
"""A name that must be shown as it is."""
CHARTS_DRAWN = "[...document.querySelectorAll('.chart')].every(chart => chart.querySelector('svg, canvas'))"
ACTIVE = "(document.activeElement.innerText || document.activeElement.id || document.activeElement.tagName).trim()"
TOP = "document.activeElement.getBoundingClientRect().top + window.scrollY"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the installed Chromium; skip the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


@contextmanager
def opened(browser: Browser, path: Path, *, width: int = 1280, dark: bool = False) -> Iterator[Page]:
    """Open a page of the file system with its charts drawn; then expect no error and no request to anywhere else."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light", offline=True
    )
    page = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.resolve().as_uri(), wait_until="load")
    page.wait_for_function(CHARTS_DRAWN)
    yield page
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("window.hostile") is None
    context.close()


def num_marks(page: Page, kind: str = "") -> int:
    """Return the number of marks that the charts drew: all of them, or of a kind such as line, symbol or rect."""
    return page.locator(f".chart g[class*='mark-{kind}'][class*='role-mark'] > path").count()


def fits(page: Page) -> bool:
    """Return True if the page does not scroll sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def tab_stops(page: Page, limit: int = 50) -> list[str]:
    """Return what the Tab key reaches from the page's start, in order, which must be that of the page."""
    stops: list[str] = []
    tops: list[float] = []
    for _ in range(limit):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        stops.append(page.evaluate(ACTIVE))
        tops.append(page.evaluate(TOP))
    assert tops == sorted(tops), list(zip(stops, tops, strict=True))
    return stops
