"""The view: its two files, its hash and its splits."""

import hashlib
import io
import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache.collection import Collection
from shared.cache.storage import LocalStorage
from shared.cache.view import View, ViewRow, read_table_name, read_view, view_names, write_view
from shared.errors import CacheError
from shared.fingerprint import Json, key_of, sealed, unsealed


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


ROWS = (*(make_row(number) for number in range(5)), make_row(5, "held_out"), make_row(6, "skipped"))


def test_view_is_read_as_it_was_written(storage: LocalStorage) -> None:
    settings: dict[str, Json] = {"data.fps": 8.0, "data.frame_buckets": [9], "data.id_token": "é"}
    view = replace(make_view(*ROWS), encoders={"vae": ((1, 2, 3, 4), (5, 6, 7, 8))}, settings=settings)
    view = replace(view, latent_rgb=((1.0, -2.5, 0.1), (3.0, 4.0, 5.0)))
    write_view(storage, view)
    assert read_view(storage, "clips") == view and view_names(storage) == ["clips"]


def test_rows_of_a_table_are_those_it_was_made_of(storage: LocalStorage) -> None:
    write_view(storage, make_view(*ROWS))
    rows = read_view(storage, "clips").rows
    assert [rows[-1], *rows[:2], *rows[::-3]] == [ROWS[-1], *ROWS[:2], *ROWS[::-3]]
    with pytest.raises(IndexError):
        rows[len(ROWS)]


def test_names_and_order_of_the_listing_change_neither_hash_nor_splits() -> None:
    view = make_view(*ROWS)
    renamed = [replace(row, source=f"{9 - int(row.source[0])}.mp4") for row in random.Random(0).sample(ROWS, len(ROWS))]
    other = replace(make_view(*renamed), name="b")
    assert view.hash == other.hash
    for split, count in (("train", 5), ("held_out", 1), ("skipped", 1)):
        keys, others = ([row.latent_key for row in each.split(split)] for each in (view, other))
        assert keys == others and len(keys) == count


def test_hash_holds_all_that_training_depends_on() -> None:
    row = make_row(0)
    view = make_view(row, make_row(1), make_row(2, "held_out"))
    others = [
        replace(view, latents=Collection("latents", "3" * 32)),
        replace(view, prompts=Collection("prompts", "3" * 32)),
        replace(view, rows=(replace(row, caption_weights=(2.0, 1.0)), *view.rows[1:])),
        replace(view, rows=(replace(row, prompt_keys=row.prompt_keys[::-1]), *view.rows[1:])),
        replace(view, rows=(replace(row, latent_key=key_of("other")), *view.rows[1:])),
        replace(view, rows=(replace(row, repeats=2), *view.rows[1:])),
        replace(view, rows=(replace(row, loss_weight=0.5), *view.rows[1:])),
        replace(view, rows=(*view.rows[:2], make_row(3, "held_out"))),
        replace(view, rows=(row, make_row(1, "held_out"), make_row(2, "held_out"))),
        replace(view, rows=(row, make_row(1), make_row(2, "skipped"))),
    ]
    assert len({view.hash, *(other.hash for other in others)}) == len(others) + 1


def test_table_of_another_view_is_refused(storage: LocalStorage) -> None:
    write_view(storage, make_view(make_row(0), make_row(1)))
    [table] = [name for name in storage.files("datasets") if name.endswith(".parquet")]
    content = storage.path(table).read_bytes()
    write_view(storage, make_view(make_row(0)))
    storage.publish(read_table_name(storage, "datasets/clips.json"), content, replace=True)
    with pytest.raises(CacheError, match=r"clips: damaged view \(its table is damaged\); run"):
        read_view(storage, "clips")


def test_table_of_other_columns_is_refused(storage: LocalStorage) -> None:
    write_view(storage, make_view(make_row(0)))
    about = storage.path("datasets/clips.json")
    table = pq.ParquetFile(storage.path(read_table_name(storage, "datasets/clips.json"))).read()
    for other in (table.drop_columns(["source_sha256"]), table.set_column(3, "frames", pa.array([9], pa.int32()))):
        stream = io.BytesIO()
        pq.write_table(other, stream)
        digest = hashlib.sha256(stream.getvalue()).hexdigest()
        storage.publish(f"datasets/{digest}.parquet", stream.getvalue())
        about.write_bytes(sealed(unsealed(about.read_bytes()) | {"table_sha256": digest}))
        with pytest.raises(CacheError, match=r"clips: damaged view \(other columns than this version writes\)"):
            read_view(storage, "clips")


def test_empty_cell_is_refused_and_a_torn_table_replaced(storage: LocalStorage) -> None:
    write_view(storage, make_view(make_row(0)))
    about, name = storage.path("datasets/clips.json"), read_table_name(storage, "datasets/clips.json")
    table = pq.ParquetFile(storage.path(name)).read()
    stream = io.BytesIO()
    pq.write_table(table.set_column(0, "source", pa.array([None], pa.string())), stream)
    storage.publish(f"datasets/{hashlib.sha256(stream.getvalue()).hexdigest()}.parquet", stream.getvalue())
    body = unsealed(about.read_bytes()) | {"table_sha256": hashlib.sha256(stream.getvalue()).hexdigest()}
    about.write_bytes(sealed(body))
    with pytest.raises(CacheError, match=r"clips: damaged view \(a cell is empty\)"):
        read_view(storage, "clips")
    storage.path(name).write_bytes(b"torn")
    write_view(storage, make_view(make_row(0)))
    assert read_view(storage, "clips") == make_view(make_row(0))


def test_json_that_makes_a_view_valid_is_written_last(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    publish = storage.publish

    def noted(name: str, content: bytes, *, replace: bool = False) -> bool:
        names.append(name)
        return publish(name, content, replace=replace)

    monkeypatch.setattr(storage, "publish", noted)
    write_view(storage, make_view(make_row(0)))
    assert names == [read_table_name(storage, "datasets/clips.json"), "datasets/clips.json"]


@pytest.mark.parametrize("encoders", [None, {"vae": [[1, 2, 3]]}])
def test_marks_of_another_form_are_refused(storage: LocalStorage, encoders: Json) -> None:
    write_view(storage, make_view(make_row(0)))
    path = storage.path("datasets/clips.json")
    path.write_bytes(sealed(unsealed(path.read_bytes()) | {"encoders": encoders}))
    with pytest.raises(CacheError, match="clips: damaged view"):
        read_view(storage, "clips")


def test_missing_view_says_what_to_run(storage: LocalStorage) -> None:
    with pytest.raises(CacheError, match=r"datasets/clips: view not found; run `precog precompute`"):
        read_view(storage, "clips")
