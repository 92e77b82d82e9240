"""The view of a data set: a parquet row per clip with its keys and split, or the reason why it was left out.

The table is named by its bytes, and `datasets/<name>.json` holds that name and its own hash.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from pydantic import TypeAdapter

from shared.cache.collection import Collection, SampleReader
from shared.cache.storage import VERIFY, Storage, open_storage
from shared.errors import CacheError, one_line
from shared.fingerprint import Json, key_of, sealed, unsealed
from shared.latent_rgb import LatentRgb
from shared.model.geometry import Bucket
from shared.model.pretrained import FileMark

VIEW_BYTES = 2**30
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

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.frames, self.height, self.width)


@dataclass(frozen=True)
class View:
    """A data set as stage 2 reads it; splits and hash are computed once."""

    name: str
    latents: Collection
    prompts: Collection
    special_prompts: dict[str, str]
    """Text -> key of the prompts encoded beside the captions: empty, negative, validation."""
    rows: tuple[ViewRow, ...]
    encoders: dict[str, tuple[FileMark, ...]] = field(default_factory=dict)
    """Part -> marks of its weight files, so that stage 2 recognizes them without reading them."""
    settings: dict[str, Json] = field(default_factory=dict)
    """Field -> value of the settings that shaped the view (`shared.cache.staleness`)."""
    latent_rgb: LatentRgb = ()
    """Map that shows latents as pictures; in no hash."""

    def split(self, name: str) -> tuple[ViewRow, ...]:
        """Return the rows of one split, ordered by their keys, not by the user's listing."""
        return tuple(row for row in self._sorted if row.split == name)

    @property
    def keys(self) -> dict[str, set[str]]:
        """Folder of a collection -> keys of its samples that the view names, of skipped clips too."""
        prompts = {key for row in self.rows for key in row.prompt_keys} | set(self.special_prompts.values())
        return {self.latents.folder: {row.latent_key for row in self.rows} - {""}, self.prompts.folder: prompts}

    @property
    def epoch_buckets(self) -> list[Bucket]:
        """Buckets of the clips of one epoch; a repeated clip comes as often as in training."""
        return [row.bucket for row in self.split("train") for _ in range(row.repeats)]

    @cached_property
    def _sorted(self) -> list[ViewRow]:
        return sorted(
            self.rows,
            key=lambda row: (row.latent_key, row.prompt_keys, row.caption_weights, row.repeats, row.loss_weight),
        )

    @cached_property
    def hash(self) -> str:
        """Hash of what training depends on: keys, weights, repeats and splits, in canonical order."""
        splits: dict[str, Json] = {
            split: [
                [row.latent_key, list(row.prompt_keys), list(row.caption_weights), row.repeats, row.loss_weight]
                for row in self.split(split)
            ]
            for split in ("train", "held_out")
        }
        return key_of({"latents": self.latents.recipe, "prompts": self.prompts.recipe, **splits})


ROWS = TypeAdapter(tuple[ViewRow, ...])
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [getattr(row, name) for row in view.rows] for name in _schema().names}
    stream = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_schema()), stream, compression="zstd")
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
        view = View(
            body["name"],
            Collection("latents", body["latents"]),
            Collection("prompts", body["prompts"]),
            body["special_prompts"],
            ROWS.validate_python(table.to_pylist()),
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


def view_names(storage: Storage, foreign: Mapping[str, Json] | None = None) -> list[str]:
    """List the views of a cache, without those of `foreign` collections (`foreign_formats`)."""
    names = [name for name in storage.files("datasets") if name.endswith(".json")]
    names = [name for name in names if not is_foreign_view(storage, name, foreign)]
    return [name.removeprefix("datasets/").removesuffix(".json") for name in names]


def is_foreign_view(storage: Storage, name: str, foreign: Mapping[str, Json] | None) -> bool:
    """Return whether the view's JSON file `name` names one of the collections `foreign`."""
    if not foreign:
        return False
    try:
        content = storage.read(name, limit_bytes=VIEW_BYTES)
    except CacheError:  # damaged
        return False
    return any(folder.rpartition("/")[2].encode() in content for folder in foreign)


def _schema() -> Any:
    import pyarrow as pa

    types: dict[Any, Any] = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
    types |= {tuple[str, ...]: pa.list_(pa.string()), tuple[float, ...]: pa.list_(pa.float64())}
    types[tuple[int, ...]] = pa.list_(pa.int64())
    return pa.schema([(column.name, types.get(column.type, pa.string())) for column in fields(ViewRow)])
