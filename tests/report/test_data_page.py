"""The page of a data set: faults in thumbnails, numbers, the list of clips in a browser, clips left out."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser
from typer.testing import CliRunner

from precog import app
from precompute.discover import read_leave_out
from report.clip_measures import describe, duplicates, measure
from report.data_page import PAGE, DataReport, make_report, write_data_page
from shared.cache.collection import Collection
from shared.cache.storage import LocalStorage
from shared.cache.view import View, ViewRow, read_view
from shared.config import Config
from shared.config_file import save_config
from shared.errors import UsageError
from shared.fingerprint import key_of
from tests.experiments import changed
from tests.report import made_clips
from tests.report.browser import HOSTILE, fits, num_marks, opened, tab_stops

FRAMES, HEIGHT, WIDTH = 9, 16, 24


def ramp(seed: int) -> np.ndarray:
    """Return a smooth random picture, uint8 [3,h,w]."""
    picture = made_clips.texture(np.random.default_rng(seed), HEIGHT, WIDTH, 4)
    return np.ascontiguousarray(picture.transpose(2, 0, 1)).astype(np.uint8)


def moving(seed: int, frames: int = FRAMES) -> np.ndarray:
    """Return thumbnails of a slow pan, uint8 [F,3,h,w]."""
    return np.stack([np.roll(ramp(seed), frame, axis=2) for frame in range(frames)])


def test_measures_name_what_a_clip_shows() -> None:
    pan, still = measure(moving(0)), measure(ramp(0)[None].repeat(FRAMES, 0))
    assert pan.moves and pan.motion > 1 and not still.moves and still.motion == 0
    assert (pan.cuts, pan.black, pan.border) == ((), 0, 0)
    cut = np.concatenate([moving(0, 4), moving(3, 5)])
    assert measure(cut).cuts == (4,)
    assert measure(np.zeros_like(cut)).black == 1
    barred = moving(0)
    barred[:, :, :3], barred[:, :, -3:] = 2, 0
    assert measure(barred).border == 6 / HEIGHT
    barred[:, :, :3] = 90  # on one side alone
    assert measure(barred).border == 0
    assert measure(moving(0)[:1]).motion == 0


def test_duplicates_are_found_at_other_sizes_and_lengths() -> None:
    smaller = moving(1).reshape(FRAMES, 3, HEIGHT // 2, 2, WIDTH // 2, 2).mean((3, 5)).astype(np.uint8)
    clips = [moving(0), moving(1), moving(2), smaller, np.clip(moving(0).astype(int) + 3, 0, 255).astype(np.uint8)]
    assert [pair[:2] for pair in duplicates(np.stack([describe(clip) for clip in clips]))] == [(3, 1), (4, 0)]


def test_clips_unlike_the_others_are_found(tmp_path: Path) -> None:
    clips = {key_of(number): moving(number) for number in range(30)}
    dark, grey, slow = key_of(4), key_of(11), key_of(23)
    clips[dark] = clips[dark] // 5
    clips[grey] = clips[grey].mean(1, keepdims=True).astype(np.uint8).repeat(3, 1)
    clips[slow] = (0.9 * clips[slow][:1] + 0.1 * clips[slow]).astype(np.uint8)
    report = make_page(tmp_path, make_view([f"{number:02}.mp4" for number in range(30)]), clips)
    found = {clip.key: clip.faults["outlier"].split()[0] for clip in report.flagged if set(clip.faults) == {"outlier"}}
    assert found == {dark: "brightness", grey: "saturation", slow: "motion"} and len(report.flagged) == 3


def make_view(sources: Sequence[str], captions: Sequence[str] = ("a grey rabbit yawns",)) -> View:
    """Return a view with one clip of each source, and one that was skipped."""
    rows = [
        ViewRow(
            source=source,
            start_seconds=0.0,
            end_seconds=4.0,
            frames=33,
            height=128,
            width=192,
            flip=False,
            latent_key=key_of(number),
            captions=(captions[number % len(captions)],),
            caption_weights=(1.0,),
            prompt_keys=("",),
            truncated_tokens=(0,),
            split="held_out" if number == 3 else "train",
            skipped="",
            source_height=108,
            source_width=192 * (1 + number % 2),
            source_seconds=4.125 if number else 0.0,
            caption_tokens=(7 + number % 9,),
        )
        for number, source in enumerate(sources)
    ]
    skipped = ViewRow(HOSTILE, 0, 0, 0, 0, 0, False, "", (), (), (), (), "skipped", "not a video: no stream")
    return View("made", Collection("latents", "1" * 32), Collection("prompts", "2" * 32), {}, (*rows, skipped))


def make_page(folder: Path, view: View, clips: dict[str, np.ndarray]) -> DataReport:
    report = make_report(view, 226, lambda row: 100, clips.__getitem__, folder)
    write_data_page(report, folder)
    return report


def hostile_page(folder: Path) -> DataReport:
    """Write a page of 60 clips with hostile names and captions; 0 is static, 59 repeats 2."""
    names = [f"{number:02}{HOSTILE}.mp4" for number in range(60)]
    view = make_view(names, [f"a rabbit {HOSTILE}", "a bird", "a fox"])
    clips = {key_of(number): moving(number, 5) for number in range(60)}
    clips[key_of(0)] = ramp(0)[None].repeat(5, 0)
    clips[key_of(59)] = clips[key_of(2)]
    return make_page(folder, view, clips)


def test_numbers_are_those_of_the_page_and_missing_ones_are_not_zero(tmp_path: Path) -> None:
    report = hostile_page(tmp_path / "one")
    again = hostile_page(tmp_path / "two")
    assert report.verdict == "58 clips usable, 2 to look at, 1 left out." and again == report
    for path in (tmp_path / "one").iterdir():
        other = (tmp_path / "two" / path.name).read_bytes()
        assert path.read_bytes().replace(b"/one/", b"/two/") == other, path.name
    numbers = json.loads(json.dumps(report.as_json()))
    shown = (tmp_path / "one" / "data.js").read_text("utf-8")
    assert json.loads(shown.removeprefix("window.showClips(").removesuffix(");\n")) == numbers
    assert numbers["counts"] == {"static": 1, "duplicate": 1, "cropped": 30}
    first, second = numbers["clips"][:2]
    assert first["source_seconds"] is None and numbers["unused_seconds"] is None
    assert second["cropped"] == pytest.approx(1 - 128 * 192 / ((128 / 108) ** 2 * 108 * 384), abs=1e-4)
    assert first["enlarged"] == pytest.approx(128 / 108, abs=1e-4)
    listed = tmp_path / "one" / "leave_out.txt"
    assert listed.read_text("utf-8").splitlines()[0].endswith("  # at 0.00 s: static")
    assert read_leave_out(listed) == {(key_of(number), report.clips[number].source) for number in (0, 59)}


@pytest.mark.browser
def test_the_list_is_searched_and_hostile_names_are_inert(browser: "Browser", tmp_path: Path) -> None:
    hostile_page(tmp_path)
    for width in (400, 1280):
        with opened(browser, tmp_path / PAGE, width=width) as page:
            page.wait_for_selector(".card")
            assert fits(page) and num_marks(page, "rect") > 4
            assert page.locator(".card").count() == 24 and page.locator(".card.look").count() == 2
            assert page.inner_text("#shown") == "1 to 24 of 60"
            assert HOSTILE[:20] in page.locator(".card .name").first.inner_text()
            if width == 400:  # one card below another
                stops = tab_stops(page, limit=60)
                assert "search" in stops and len(stops) > 24 + 2 + 4, stops
    with opened(browser, tmp_path / PAGE) as page:
        page.wait_for_selector(".card")
        page.click("#next")
        page.click("#next")
        assert page.inner_text("#shown") == "49 to 60 of 60" and page.is_disabled("#next")
        page.fill("#search", "FOX 59")
        assert page.locator(".card").count() == 1 and "repeats another clip" in page.inner_text(".card .why")
        page.fill("#search", "nowhere")
        assert page.locator(".card").count() == 0 and page.inner_text("#shown") == "no clip"
        page.fill("#search", "")
        for kind, count in (("look", 2), ("static", 1), ("held_out", 1)):
            page.select_option("#filter", kind)
            assert page.locator(".card").count() == count
        page.select_option("#filter", "look")
        page.locator(".card input").first.uncheck()
        assert [line[:32] for line in page.input_value("#lines").splitlines()] == [key_of(59)]
        page.locator(".strip").nth(1).focus()
        assert page.locator(".strip").nth(1).evaluate("e => getComputedStyle(e).animationName") == "play"


def test_command_writes_the_page_and_clips_are_left_out(
    experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.stderr
        return result.stdout + result.stderr

    cache = tmp_path / "cache"
    run_folder = {"output_dir": tmp_path / "runs" / "run"}
    config = changed(experiment, precompute={"cache": str(cache)}, train=run_folder)
    run("cache", "pull", experiment.precompute.cache, str(cache))
    save_config(config, tmp_path / "config.toml")
    monkeypatch.setattr("precompute.cli.MAX_PAGE_CLIPS", 7)
    assert "data page: not written for 8 clips" in run("precompute", str(tmp_path / "config.toml"))
    monkeypatch.undo()
    assert "to look at, 0 left out." in run("precompute", str(tmp_path / "config.toml"))
    page = tmp_path / "runs" / "clips-data" / PAGE
    before = page.stat().st_mtime_ns
    assert str(page) in run("precompute", str(tmp_path / "config.toml")) and page.stat().st_mtime_ns == before
    shown = json.loads(run("report", "data", str(tmp_path / "config.toml"), "--json").splitlines()[0])
    assert shown["page"] == str(page) and len(shown["clips"]) == 8 and shown["text_length"] > 0
    assert all(clip["caption_tokens"][0] > 1 and clip["source_seconds"] > 0 for clip in shown["clips"])

    key, listed = shown["clips"][0]["key"], page.with_name("leave_out.txt")  # the page's list, which is written again
    listed.write_text(f'{key} "a copy with \\"#\\".mp4"', "utf-8")
    assert "names no clip" in run("precompute", str(tmp_path / "config.toml"), f"data.leave_out={listed}")
    listed.write_text(f"# by hand\n{key}  # not this one\n\n", "utf-8")
    assert '"encoded": 0' in run("precompute", str(tmp_path / "config.toml"), f"data.leave_out={listed}", "--json")
    [row] = read_view(LocalStorage(str(cache)), "clips").split("skipped")
    assert (row.source, row.skipped) == (shown["clips"][0]["source"], "left out: by data.leave_out")
    assert key not in page.with_name("data.js").read_text("utf-8") and key in listed.read_text("utf-8")
    for wrong in ("../clip.mp4", f'{key} "open', f"{key} clip.mp4", f'{key} "\\q"'):
        listed.write_text(wrong, "utf-8")
        with pytest.raises(UsageError, match=r"data\.leave_out: .* is not a key"):
            read_leave_out(listed)

    page.parent.rename(tmp_path / "moved")
    page.parent.write_text("in the way", "utf-8")
    assert "data page: not written (" in run("precompute", str(tmp_path / "config.toml"))


@pytest.mark.faults
def test_planted_faults_are_found(tmp_path: Path) -> None:
    made_clips.write_clips(tmp_path / "clips", good=100, each=5)
    paths = sorted((tmp_path / "clips").iterdir())
    clips = {key_of(number): made_clips.thumbnails_of(path) for number, path in enumerate(paths)}
    report = make_page(tmp_path / "page", make_view([path.name for path in paths]), clips)
    kinds = {clip.source: set(clip.faults) for clip in report.clips}
    found = sum(any(name.find(kind) >= 0 and kind in kinds[name] for kind in made_clips.FAULTS) for name in kinds)
    wrong = [name for name, faults in kinds.items() if name.startswith("good") and faults]
    assert found >= 23 and len(wrong) <= 2, (found, wrong)


@pytest.mark.faults
@pytest.mark.browser
@pytest.mark.timeout(900)
def test_ten_thousand_clips_open_in_three_seconds(browser: "Browser", tmp_path: Path) -> None:
    count, base = 10_000, [np.kron(moving(number, 5), np.ones((1, 1, 2, 2), np.uint8)) for number in range(50)]
    generator = np.random.default_rng(0)
    words = np.array(
        ["a", "grey", "rabbit", "yawns", "while", "white", "birds", "glide", "over", "the", "old", "green", "meadow"]
    )
    view = make_view(
        [f"folder/video-{number:05}.mp4" for number in range(count)],
        [" ".join(generator.choice(words, 40)) for _ in range(997)],
    )
    shifted = {key_of(number): (number % 50, number // 50) for number in range(count)}

    class Clips(dict[str, np.ndarray]):
        def __getitem__(self, key: str) -> np.ndarray:
            clip, shift = shifted[key]
            return np.roll(base[clip], (shift % 32, shift), (2, 3)) // 2 + np.uint8(shift // 2)

    report = make_page(tmp_path, view, Clips())
    assert len(report.clips) == count
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 30e6
    started = time.monotonic()
    with opened(browser, tmp_path / PAGE) as page:
        page.wait_for_selector(".card")
        seconds = time.monotonic() - started
        page.fill("#search", "video-09876")
        assert page.locator(".card").count() == 1
    assert seconds < 3, seconds
