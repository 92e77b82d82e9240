"""The data set's table: one parquet row per clip with its keys, its split, and why it was left out if it was."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from shared.cache.collection import Collection
from shared.cache.storage import Storage
from shared.errors import CacheError
from shared.fingerprint import Json, key_of
from shared.model.geometry import Bucket
from shared.model.pretrained import FileMark

VIEW_BYTES = 2**30


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
    """Why the clip was left out; empty when it was not."""
    source_sha256: str = ""
    """Of the source's bytes; empty where it could not be read."""

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.frames, self.height, self.width)


@dataclass(frozen=True)
class View:
    """A data set as stage 2 sees it; what follows from its rows, which may be many, is worked out once."""

    name: str
    latents: Collection
    prompts: Collection
    special_prompts: dict[str, str]
    """Text -> key of the prompts encoded beside the captions: empty, negative, validation."""
    rows: tuple[ViewRow, ...]
    encoders: dict[str, tuple[FileMark, ...]] = field(default_factory=dict)
    """Part -> marks of the weight files it was made with, so that stage 2 knows them again without reading them."""
    settings: dict[str, Json] = field(default_factory=dict)
    """Field -> value, of the fields that shaped it (`shared.cache.settings`)."""

    def split(self, name: str) -> tuple[ViewRow, ...]:
        """The rows of one split in canonical order: by what they hold, not by where they were listed."""
        return self._splits.get(name, ())

    @cached_property
    def _splits(self) -> dict[str, tuple[ViewRow, ...]]:
        splits: dict[str, list[ViewRow]] = {}
        for row in sorted(self.rows, key=lambda row: (row.latent_key, row.prompt_keys, row.caption_weights)):
            splits.setdefault(row.split, []).append(row)
        return {name: tuple(rows) for name, rows in splits.items()}

    @cached_property
    def hash(self) -> str:
        """Names what training depends on: keys, weights and splits, in canonical order."""
        content: dict[str, Json] = {
            "latents": self.latents.recipe,
            "prompts": self.prompts.recipe,
            **{
                split: [[row.latent_key, list(row.prompt_keys), list(row.caption_weights)] for row in self.split(split)]
                for split in ("train", "held_out")
            },
        }
        return key_of(content)


def write_view(storage: Storage, view: View) -> None:
    """Publish `datasets/<name>.parquet`, then the `.json` that makes it valid; replaces an older view of that name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {column.name: [getattr(row, column.name) for row in view.rows] for column in fields(ViewRow)}
    table = pa.table(columns, schema=_schema())
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    about = {
        "name": view.name,
        "latents": view.latents.recipe,
        "prompts": view.prompts.recipe,
        "special_prompts": view.special_prompts,
        "clips": {split: len(view.split(split)) for split in ("train", "held_out", "skipped")},
        "hash": view.hash,
        "encoders": view.encoders,
        "settings": view.settings,
    }
    storage.publish(f"datasets/{view.name}.parquet", stream.getvalue(), replace=True)
    content = json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False).encode()
    storage.publish(f"datasets/{view.name}.json", content, replace=True)


def read_view(storage: Storage, name: str) -> View:
    """Raises `CacheError` if there is no such view or its two files do not belong together."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"{storage}/datasets/{name}"
    if not storage.exists(f"datasets/{name}.json"):
        raise CacheError(f"{where}: no such view; run `precog precompute` with this config first")
    try:
        about = json.loads(storage.read(f"datasets/{name}.json", limit_bytes=VIEW_BYTES))
        content = storage.read(f"datasets/{name}.parquet", limit_bytes=VIEW_BYTES)
        # The threaded data set reader of pyarrow 26 aborts now and then at exit beside torch; this one does not.
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        if not table.schema.equals(_schema()):
            raise ValueError("other columns than this version writes")
        rows = tuple(_row(values) for values in table.to_pylist())
        view = View(
            about["name"],
            Collection("latents", about["latents"]),
            Collection("prompts", about["prompts"]),
            about["special_prompts"],
            rows,
            {part: tuple((size, mtime) for size, mtime in files) for part, files in about["encoders"].items()},
            dict(about["settings"]),
        )
        if view.hash != about["hash"]:
            raise ValueError("table and description do not belong together")
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        again = "`precog precompute` with its config makes it again"
        raise CacheError(f"{where}: damaged view ({error}); {again}") from None
    return view


def view_names(storage: Storage) -> list[str]:
    """The views of a cache."""
    return [name.removeprefix("datasets/").removesuffix(".json") for name in storage.names("datasets", ".json")]


def _row(values: Mapping[str, Any]) -> ViewRow:
    arguments: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return ViewRow(**arguments)


def _schema() -> Any:
    import pyarrow as pa

    types = {
        str: pa.string(),
        float: pa.float64(),
        int: pa.int64(),
        bool: pa.bool_(),
        tuple[str, ...]: pa.list_(pa.string()),
        tuple[float, ...]: pa.list_(pa.float64()),
        tuple[int, ...]: pa.list_(pa.int64()),
    }
    return pa.schema([(name, types.get(kind, pa.string())) for name, kind in ViewRow.__annotations__.items()])
