"""The view of a data set: a parquet row per clip with its keys and split, or the reason why it was left out.

The table is named by its bytes, and `datasets/<name>.json` holds that name and its own hash.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from shared.cache.collection import KINDS, VIEW_BYTES, Collection, SampleReader, without_foreign
from shared.cache.storage import VERIFY, Storage, open_storage
from shared.errors import CacheError, one_line
from shared.fingerprint import Json, key_of, sealed, unsealed
from shared.latent_rgb import LatentRgb
from shared.model.geometry import Bucket
from shared.model.pretrained import FileMark

SPLITS = ("train", "held_out", "skipped")


@dataclass(frozen=True, slots=True)
class ViewRow:
    """One clip: a window of a source with its captions."""

    source: str
    """Path relative to the data root, for people; keys come from bytes."""
    start_seconds: float
    end_seconds: float
    frames: int
    height: int
    width: int
    flip: bool
    latent_key: str
    captions: tuple[str, ...]
    caption_weights: tuple[float, ...]
    prompt_keys: tuple[str, ...]
    truncated_tokens: tuple[int, ...]
    """Per caption, tokens beyond the text length."""
    split: Literal["train", "held_out", "skipped"]
    skipped: str
    """The reason why the clip was left out; empty if it was not."""
    source_sha256: str = ""
    """Of the source's bytes; empty if it could not be read."""
    repeats: int = 1
    """Times that the clip comes in an epoch."""
    loss_weight: float = 1.0
    """Factor of the clip's training loss."""
    source_height: int = 0
    """Of the source as displayed, in pixels; 0 if it could not be read."""
    source_width: int = 0
    source_seconds: float = 0.0
    """Duration of the source; 0 if unknown."""
    caption_tokens: tuple[int, ...] = ()
    """Per caption, its length in tokens."""

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.frames, self.height, self.width)


class ViewRows(Sequence[ViewRow]):
    """Rows of a table; a row is made when it is asked for, as 100,000 of them would take 200 MB."""

    def __init__(self, table: Any, numbers: npt.NDArray[np.int64] | None = None) -> None:
        """Choose the rows `numbers`, in their order; None for all."""
        self._whole, self._numbers = table, numbers

    @property
    def table(self) -> Any:
        """The rows as an arrow table."""
        return self._taken(self._whole)

    def _taken(self, table: Any) -> Any:
        import pyarrow as pa

        if self._numbers is None:
            return table
        buffers = [None, pa.py_buffer(self._numbers)]  # `pa.array` would import pandas, 40 MB
        return table.take(pa.Array.from_buffers(pa.int64(), len(self._numbers), buffers))

    def __len__(self) -> int:
        return int(self._whole.num_rows) if self._numbers is None else len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> ViewRow: ...
    @overload
    def __getitem__(self, index: slice) -> "ViewRows": ...
    def __getitem__(self, index: int | slice) -> "ViewRow | ViewRows":
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        number = range(len(self))[index]
        return next(iter(ViewRows(self._whole.slice(number if self._numbers is None else self._numbers[number], 1))))

    def __iter__(self) -> Iterator[ViewRow]:
        for batch in self.table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                cells: dict[str, Any] = {}
                for name, cell in row.items():
                    cells[name] = tuple(cell) if isinstance(cell, list) else cell
                yield ViewRow(**cells)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def column(self, name: str) -> list[Any]:
        """Return a field of every row; lists in place of tuples."""
        cells: list[Any] = self._taken(self._whole.select([name]))[name].to_pylist()
        return cells

    def take(self, chosen: Sequence[int]) -> "ViewRows":
        """Return the rows with these numbers, in their order."""
        numbers = np.array(chosen, np.int64)
        return ViewRows(self._whole, numbers if self._numbers is None else self._numbers[numbers])

    @property
    def buckets(self) -> list[Bucket]:
        """Return the bucket of every row."""
        shapes = zip(*(self.column(name) for name in ("frames", "height", "width")), strict=True)
        return [Bucket(*shape) for shape in shapes]


def rows_of(rows: Sequence[ViewRow]) -> ViewRows:
    """Return the rows as a table."""
    import pyarrow as pa

    if isinstance(rows, ViewRows):
        return rows
    schema = _schema()
    return ViewRows(pa.table({name: [getattr(row, name) for row in rows] for name in schema.names}, schema=schema))


@dataclass(frozen=True)
class View:
    """A data set as stage 2 reads it; splits and hash are computed once."""

    name: str
    latents: Collection
    prompts: Collection
    special_prompts: dict[str, str]
    """Text -> key of the prompts encoded beside the captions: empty, negative, validation."""
    rows: Sequence[ViewRow]
    encoders: dict[str, tuple[FileMark, ...]] = field(default_factory=dict)
    """Part -> marks of its weight files, so that stage 2 recognizes them without reading them."""
    settings: dict[str, Json] = field(default_factory=dict)
    """Field -> value of the settings that shaped the view (`shared.cache.staleness`)."""
    latent_rgb: LatentRgb = ()
    """Map that shows latents as pictures; in no hash."""

    def split(self, name: str) -> ViewRows:
        """Return the rows of one split, ordered by their keys, not by the user's listing."""
        return self._splits[name]

    @cached_property
    def _splits(self) -> dict[str, ViewRows]:
        splits = self.table.column("split")
        return {
            name: self.table.take([row for row in self._order_and_hash[0] if splits[row] == name]) for name in SPLITS
        }

    @cached_property
    def table(self) -> ViewRows:
        """The rows as a table."""
        return rows_of(self.rows)

    @property
    def keys(self) -> dict[str, set[str]]:
        """Folder of a collection -> keys of its samples that the view names, of skipped clips too."""
        prompts = {*chain.from_iterable(self.table.column("prompt_keys")), *self.special_prompts.values()}
        return {self.latents.folder: {*self.table.column("latent_key")} - {""}, self.prompts.folder: prompts}

    @property
    def epoch_buckets(self) -> list[Bucket]:
        """Buckets of the clips of one epoch; a repeated clip comes as often as in training."""
        rows = self.split("train")
        repeated = zip(rows.buckets, rows.column("repeats"), strict=True)
        return [bucket for bucket, repeats in repeated for _ in range(repeats)]

    @property
    def hash(self) -> str:
        """Hash of what training depends on: keys, weights, repeats and splits, in canonical order."""
        return self._order_and_hash[1]

    @cached_property
    def _order_and_hash(self) -> tuple[list[int], str]:
        names = ("latent_key", "prompt_keys", "caption_weights", "repeats", "loss_weight")
        trained = [*zip(*(self.table.column(name) for name in names), strict=True)]
        order = sorted(range(len(trained)), key=trained.__getitem__)
        parts = self.table.column("split")
        splits = {name: [trained[row] for row in order if parts[row] == name] for name in SPLITS[:2]}
        return order, key_of({"latents": self.latents.recipe, "prompts": self.prompts.recipe, **splits})


MARKS = TypeAdapter(dict[str, tuple[FileMark, ...]])


def table_name(sha256: str) -> str:
    """Return the name of a view's table with that hash."""
    return f"datasets/{sha256}.parquet"


def read_table_name(storage: Storage, name: str) -> str:
    """Return the table's name in a view's JSON file `name`; raises `CacheError` if the file is damaged."""
    try:
        return table_name(unsealed(storage.read(name, limit_bytes=VIEW_BYTES))["table_sha256"])
    except (ValueError, KeyError) as error:
        raise CacheError(f"{storage}/{name}: damaged view ({one_line(error)}); {VERIFY}") from None


def write_view(storage: Storage, view: View) -> None:
    """Publish the table, then `datasets/<name>.json`, which alone switches from an older view."""
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(view.table.table, stream, compression="zstd")
    digest = hashlib.sha256(stream.getbuffer()).hexdigest()
    body = {
        "name": view.name,
        "latents": view.latents.recipe,
        "prompts": view.prompts.recipe,
        "special_prompts": view.special_prompts,
        "clips": {split: len(view.split(split)) for split in SPLITS},
        "hash": view.hash,
        "encoders": view.encoders,
        "settings": view.settings,
        "latent_rgb": view.latent_rgb,
        "table_sha256": digest,
    }
    storage.publish(table_name(digest), stream.getvalue(), replace=True)  # an older one may be torn
    storage.publish(f"datasets/{view.name}.json", sealed(body), replace=True)


def read_view(storage: Storage, name: str) -> View:
    """Read a view; raises `CacheError` if it does not exist or is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"{storage}/datasets/{name}"
    if storage.size(f"datasets/{name}.json") is None:
        raise CacheError(f"{where}: view not found; run `precog precompute` with this config first")
    try:
        body = unsealed(storage.read(f"datasets/{name}.json", limit_bytes=VIEW_BYTES))
        content = storage.read(table_name(body["table_sha256"]), limit_bytes=VIEW_BYTES)
        if hashlib.sha256(content).hexdigest() != body["table_sha256"]:
            raise ValueError("its table is damaged")
        # The threaded data set reader of pyarrow 26 sometimes aborts at exit beside torch; this one does not.
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        if not table.schema.equals(_schema()):
            raise ValueError("other columns than this version writes")
        if any(column.null_count for column in table.columns):
            raise ValueError("a cell is empty")
        view = View(
            body["name"],
            Collection("latents", body["latents"]),
            Collection("prompts", body["prompts"]),
            body["special_prompts"],
            ViewRows(table),
            MARKS.validate_python(body["encoders"]),
            body["settings"],
            tuple(map(tuple, body["latent_rgb"])),
        )
        if view.name != name:
            raise ValueError(f"it is the view {view.name}")
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        reason = f"damaged view ({one_line(error)})"
        raise CacheError(f"{where}: {reason}; run `precog precompute` with its config again") from None
    return view


def open_view(cache: str, name: str) -> tuple[View, SampleReader, SampleReader]:
    """Return a view of the cache at a folder or URL, and the readers of its latents and prompts by key."""
    storage = open_storage(cache)
    view = read_view(storage, name)
    latents, prompts = (SampleReader(storage, of, view.keys[of.folder]) for of in (view.latents, view.prompts))
    return view, latents, prompts


def view_names(storage: Storage) -> list[str]:
    """List the views of collections of this format."""
    own, _ = without_foreign(storage, [name for folder in (*KINDS, "datasets") for name in storage.files(folder)])
    names = [name.removeprefix("datasets/") for name in own if name.startswith("datasets/")]
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def _schema() -> Any:
    import pyarrow as pa

    types: dict[Any, Any] = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
    types |= {tuple[str, ...]: pa.list_(pa.string()), tuple[float, ...]: pa.list_(pa.float64())}
    types[tuple[int, ...]] = pa.list_(pa.int64())
    return pa.schema([(column.name, types.get(column.type, pa.string())) for column in fields(ViewRow)])
