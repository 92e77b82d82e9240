"""A cache as a data set on the hub: `precog cache push` to hf://datasets/user/name, many files per commit."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.cache.collection import SampleReader, collections
from shared.cache.storage import VERIFY, LocalStorage, Storage
from shared.cache.verify import Track, verify
from shared.cache.view import View, read_table_name, read_view, view_names
from shared.errors import CacheError, UsageError
from shared.hub import check_repository, upload_folder

HUB = "hf://datasets/"
CARD, PREVIEW = "README.md", "preview.parquet"
"""Files that the data set has in addition to the cache's."""
MAX_PREVIEWS, FRAMES_SHOWN = 200, 4


def push_to_hub(source: Storage, url: str, *, public: bool = False, track: Track = iter) -> str:
    """Upload a cache folder to hf://datasets/user/name with a data set card; return the page's address.

    Every file is compared with its hash first. Tars go before receipts and receipts before views, and the same call
    continues after a kill. A view of the same name is replaced; the repository's history keeps the earlier one.
    Raises `UsageError` if the source is no folder, and `CacheError` if a file of it is damaged.
    """
    repository = url.removeprefix(HUB).rstrip("/")
    check_repository(repository)
    if not isinstance(source, LocalStorage):
        raise UsageError(f"{source}: not a folder; copy it with `precog cache pull` first")
    _, damaged = verify(source, repair=False, track=track)
    if damaged:
        raise CacheError(f"{damaged[0]}; {VERIFY}")
    names = view_names(source)
    folders = [collection.folder for collection in collections(source)]
    tables = [read_table_name(source, f"datasets/{name}.json") for name in names]
    groups = [
        [*(f"{folder}/*.tar" for folder in folders), *(f"{folder}/recipe.json" for folder in folders), *tables],
        [*(f"{folder}/*.json" for folder in folders), "made_by/*.json"],
        [f"datasets/{name}.json" for name in names],
    ]
    upload_folder(source.root, repository, "dataset", groups, public=public)
    views = [read_view(source, name) for name in names]
    with tempfile.TemporaryDirectory(prefix="precog-card-") as folder:
        write_previews(source, views, Path(folder, PREVIEW))
        Path(folder, CARD).write_text(card(views, repository), "utf-8")
        return upload_folder(Path(folder), repository, "dataset", public=public)


def card(views: Sequence[View], repository: str) -> str:
    """Return the data set card: what the cache holds, and how to get it."""
    lines = ["---", "tags: [cogvideox, precog-cache, webdataset]", "task_categories: [text-to-video]", "configs:"]
    lines += ["- config_name: preview", f"  data_files: {PREVIEW}", "---", "", f"# {repository.partition('/')[2]}"]
    lines += ["", "Latents and prompt embeddings to train CogVideoX with Precog.", ""]
    for view in views:
        train, held_out = view.split("train"), view.split("held_out")
        buckets = Counter(str(row.bucket) for row in train)
        sizes = ", ".join(f"{count} of {bucket}" for bucket, count in sorted(buckets.items()))
        lines.append(f"- `{view.name}`: {len(train)} clips to train on ({sizes}), {len(held_out)} held out")
    return "\n".join([*lines, "", f"`precog cache pull {HUB}{repository} cache` copies the cache for training.", ""])


def write_previews(source: Storage, views: Sequence[View], path: Path) -> None:
    """Write a parquet file of the first clips, whose column "image" the hub's viewer shows: four frames in a row."""
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Picture

    rows: list[dict[str, Any]] = []
    for view in views:
        latents = SampleReader(source, view.latents, view.keys[view.latents.folder])
        for row in view.split("train")[: MAX_PREVIEWS - len(rows)]:
            frames = latents.read(row.latent_key)["thumbnails"]  # uint8 [F,3,H,W]
            shown = frames[:: -(-len(frames) // FRAMES_SHOWN)].permute(2, 0, 3, 1).flatten(1, 2)
            image = Picture.fromarray(shown.numpy())
            rows.append({"view": view.name, "size": str(row.bucket), "caption": row.captions[0], "image": image})
    features = Features({name: Value("string") for name in ("view", "size", "caption")} | {"image": Image()})
    Dataset.from_list(rows, features=features).to_parquet(path)
