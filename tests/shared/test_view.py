"""The view: its two files, what follows from its rows, and how often that is worked out."""

import random
from pathlib import Path

import pytest

from shared import view as view_module
from shared.files import LocalStorage
from shared.fingerprint import Json, key_of
from shared.store import Collection
from shared.view import View, ViewRow, read_view, write_view


def make_row(number: int, split: str = "train") -> ViewRow:
    return ViewRow(
        source=f"{number}.mp4",
        start_seconds=0.0,
        end_seconds=1.0,
        frames=9,
        height=32,
        width=48,
        flip=False,
        latent_key=key_of(["latent", number]),
        captions=("a grey rabbit", "yawns"),
        caption_weights=(1.0, 2.0),
        prompt_keys=(key_of(["first", number]), key_of(["second", number])),
        truncated_tokens=(0, 3),
        split=split,  # type: ignore[arg-type]
        skipped="" if split != "skipped" else "too short",
    )


def make_view(*rows: ViewRow) -> View:
    return View("clips", Collection("latents", "1" * 32), Collection("prompts", "2" * 32), {"": key_of("")}, rows)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Json]:
    """What was hashed as a view's content."""
    seen: list[Json] = []

    def counted(value: Json) -> str:
        seen.append(value)
        return key_of(value)

    monkeypatch.setattr(view_module, "key_of", counted)
    return seen


def test_a_view_comes_back_as_it_was_written(tmp_path: Path) -> None:
    view = make_view(*(make_row(number) for number in range(5)), make_row(5, "held_out"), make_row(6, "skipped"))
    write_view(LocalStorage(str(tmp_path)), view)
    assert read_view(LocalStorage(str(tmp_path)), "clips") == view


def test_the_order_of_the_listing_is_in_neither_hash_nor_splits() -> None:
    rows = [*(make_row(number) for number in range(5)), make_row(5, "held_out")]
    view, shuffled = make_view(*rows), make_view(*random.Random(0).sample(rows, len(rows)))
    assert view.hash == shuffled.hash
    assert view.split("train") == shuffled.split("train")
    assert [len(view.split(split)) for split in ("train", "held_out", "skipped")] == [5, 1, 0]
    assert make_view(*rows[:4]).hash != view.hash


def test_a_view_is_hashed_once_however_often_its_hash_is_asked_for(tmp_path: Path, hashed: list[Json]) -> None:
    view, storage = make_view(*(make_row(number) for number in range(5))), LocalStorage(str(tmp_path))
    write_view(storage, view)
    assert len(hashed) == 1
    found = read_view(storage, "clips")
    assert [found.hash for _ in range(10)] == [view.hash] * 10
    assert len(hashed) == 2, "once to write it, once to check what was read"
