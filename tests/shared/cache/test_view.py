"""The view: its two files, what follows from its rows, and how often that is worked out."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from shared.cache import view as view_module
from shared.cache.collection import Collection
from shared.cache.storage import LocalStorage
from shared.cache.view import View, ViewRow, read_view, write_view
from shared.errors import CacheError
from shared.fingerprint import Json, key_of


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


def test_everything_that_training_depends_on_is_in_the_hash_and_what_people_read_is_not() -> None:
    row = make_row(0)
    view = make_view(row, make_row(1), make_row(2, "held_out"))
    others = [
        replace(view, latents=Collection("latents", "3" * 32)),
        replace(view, prompts=Collection("prompts", "3" * 32)),
        replace(view, rows=(replace(row, caption_weights=(2.0, 1.0)), *view.rows[1:])),
        replace(view, rows=(replace(row, prompt_keys=row.prompt_keys[::-1]), *view.rows[1:])),
        replace(view, rows=(replace(row, latent_key=key_of("other")), *view.rows[1:])),
        replace(view, rows=(*view.rows[:2], make_row(3, "held_out"))),
        replace(view, rows=(row, make_row(1, "held_out"), make_row(2, "held_out"))),
        replace(view, rows=(row, make_row(1), make_row(2, "skipped"))),
    ]
    assert len({view.hash, *(other.hash for other in others)}) == len(others) + 1
    renamed = replace(view, name="b", rows=tuple(replace(row, source=f"b/{row.source}") for row in view.rows))
    assert renamed.hash == view.hash


def test_names_do_not_order_a_split() -> None:
    rows = [make_row(number) for number in range(5)]
    renamed = [replace(row, source=f"{9 - number}.mp4") for number, row in enumerate(rows)]
    assert [row.latent_key for row in make_view(*renamed).split("train")] == [
        row.latent_key for row in make_view(*rows).split("train")
    ]


def test_two_files_that_do_not_belong_together_are_no_view(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    write_view(storage, make_view(make_row(0), make_row(1)))
    table = storage.path("datasets/clips.parquet").read_bytes()
    write_view(storage, make_view(make_row(0)))
    storage.publish("datasets/clips.parquet", table, replace=True)
    with pytest.raises(CacheError, match=r"clips: damaged view .table and description do not belong together."):
        read_view(storage, "clips")


def test_a_table_of_other_columns_is_no_view(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    storage = LocalStorage(str(tmp_path))
    write_view(storage, make_view(make_row(0)))
    path = storage.path("datasets/clips.parquet")
    table = pq.ParquetFile(path).read()
    for other in (
        table.drop_columns(["source_sha256"]),
        table.set_column(3, "frames", pa.array([9], pa.int32())),
    ):
        pq.write_table(other, path)
        with pytest.raises(CacheError, match=r"clips: damaged view .other columns than this version writes."):
            read_view(storage, "clips")


def test_the_file_that_makes_a_view_valid_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, names = LocalStorage(str(tmp_path)), []
    publish = storage.publish
    monkeypatch.setattr(
        storage, "publish", lambda name, *rest, **named: (names.append(name), publish(name, *rest, **named))[1]
    )
    write_view(storage, make_view(make_row(0)))
    assert names == ["datasets/clips.parquet", "datasets/clips.json"]


@pytest.mark.parametrize("marks", [[1], [[1]], [[1, 2, 3]], "ab", {"a": 1}])
def test_marks_of_weight_files_that_are_none_are_no_view(tmp_path: Path, marks: Json) -> None:
    storage = LocalStorage(str(tmp_path))
    write_view(storage, replace(make_view(make_row(0)), encoders={"vae": ((1, 2),)}))
    path = storage.path("datasets/clips.json")
    about = json.loads(path.read_bytes())
    about["encoders"]["vae"] = marks
    path.write_text(json.dumps(about), "utf-8")
    with pytest.raises(CacheError, match="clips: damaged view"):
        read_view(storage, "clips")
