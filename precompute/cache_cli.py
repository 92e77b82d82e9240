"""`precog cache`: look at, check, clean and copy a cache. Everything heavy is imported inside the commands."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.command import JsonOutput, exits
from shared.signals import raise_on_signal

if TYPE_CHECKING:
    from shared.cache.collection import Collection
    from shared.cache.storage import Storage

cache_app = typer.Typer(help="Look at, check, clean and copy a cache.", no_args_is_help=True)

CacheName = Annotated[str, typer.Argument(help="Cache: a folder or a URL.")]
OtherCache = Annotated[
    str, typer.Argument(help="The other cache: a folder or URL such as s3://bucket/cache, hf://datasets/user/name.")
]
Replace = Annotated[bool, typer.Option(help="Replace views of the same name that differ.")]


def _open_cache(cache: str, **options: Any) -> "Storage":
    """Open a cache; raise `UsageError` if it is empty, as a mistyped name is."""
    from shared.cache.storage import open_storage
    from shared.errors import UsageError

    storage = open_storage(cache, **options)
    if not any(storage.files(folder) for folder in ("latents", "prompts", "datasets")):
        raise UsageError(f"{cache}: cache not found; give the folder or URL of precompute.cache")
    return storage


def _say_foreign(foreign: Any) -> None:
    from shared.console import say

    for folder, written in foreign.items():
        say(f"{folder}: cache format {written}, left alone")


@cache_app.command("ls")
@exits
def cache_ls(cache: CacheName = "cache", json_output: JsonOutput = False) -> None:
    """List the collections and views of a cache."""
    from shared.cache.collection import collections, foreign_formats, read_recipe, shards
    from shared.cache.view import read_view, view_names
    from shared.console import bytes_text, table

    storage = _open_cache(cache)
    foreign = foreign_formats(storage)
    listed: dict[str, dict[str, Any]] = {"collections": {}, "datasets": {}, "other_formats": foreign}
    for collection in collections(storage):
        found = list(shards(storage, collection.folder))
        buckets: Counter[str] = Counter()
        for tar, receipt in found:
            if len(parts := tar.split("/")) == 4:
                buckets[parts[2]] += len(receipt.samples)
        facts = {
            "precision": read_recipe(storage, collection).get("precision", ""),
            "shards": len(found),
            "samples": sum(len(receipt.samples) for _, receipt in found),
        }
        size = sum(receipt.size for _, receipt in found)
        listed["collections"][collection.folder] = {**facts, "buckets": dict(sorted(buckets.items())), "bytes": size}
        table(collection.folder, [*facts.items(), *sorted(buckets.items()), ("size", bytes_text(size))])
    for name in view_names(storage):
        view = read_view(storage, name)
        clips = {split: len(view.split(split)) for split in ("train", "held_out", "skipped")}
        listed["datasets"][name] = facts = {**clips, "latents": view.latents.recipe, "prompts": view.prompts.recipe}
        table(f"datasets/{name}", [*facts.items()])
    _say_foreign(foreign)
    if json_output:
        typer.echo(json.dumps(listed))


@cache_app.command("show")
@exits
def cache_show(
    key: Annotated[str, typer.Argument(help="Key of a sample, or its beginning.")],
    cache: CacheName = "cache",
    decode: Annotated[str, typer.Option(help="Also write KEY.mp4 with the VAE of this checkpoint.")] = "",
    json_output: JsonOutput = False,
) -> None:
    """Show what a sample is: source, window, bucket, shapes, sizes, recipe, and the views that name it."""
    from shared.cache.collection import read_recipe
    from shared.cache.shard import read_facts
    from shared.cache.transfer import find_sample
    from shared.cache.view import read_view, view_names
    from shared.console import bytes_text, table
    from shared.errors import UsageError

    storage = _open_cache(cache)
    found = find_sample(storage, key)
    keys = sorted({name for *_, name in found})
    if len(keys) != 1:
        problem = (
            f"the start of {len(keys)} keys, such as {keys[0]}; give more digits"
            if keys
            else f"not found in {cache}; give a sample's key"
        )
        raise UsageError(f"key {key}: {problem}")
    collection, receipt, name = found[0]
    facts: dict[str, Any] = {"collection": collection.folder, "receipt": receipt.name, "tar": receipt.tar}
    for place in (place for place in receipt.samples if place.key == name):
        tensors = {part: f"{tensor.dtype} {list(tensor.shape)}" for part, tensor in place.tensors.items()}
        facts |= read_facts(storage, receipt.tar, place) | tensors | {"size": bytes_text(place.length)}
    if name in receipt.skipped:
        facts["skipped"] = receipt.skipped[name]
    rows = []
    for view_name in view_names(storage):
        view = read_view(storage, view_name)
        if name in view.keys.get(collection.folder, ()):
            named = [row for row in view.rows if name in (row.latent_key, *row.prompt_keys)]
            rows += [f"{view_name}: {row.source} {row.start_seconds:g}-{row.end_seconds:g} s" for row in named]
            rows += [] if named else [f"{view_name}: special prompt"]
    facts |= {"views": rows, "recipe": read_recipe(storage, collection)}
    if decode:
        facts["video"] = str(_decode(storage, collection, name, decode, facts))
    table(name, [(field, value if isinstance(value, str) else json.dumps(value)) for field, value in facts.items()])
    if json_output:
        typer.echo(json.dumps({"key": name, **facts}))


def _decode(storage: "Storage", collection: "Collection", key: str, checkpoint: str, facts: dict[str, Any]) -> Path:
    """Write a clip's posterior mean as KEY.mp4 into the working folder and return its path."""
    from shared.cache.collection import SampleReader
    from shared.config import Model
    from shared.device import choose_device
    from shared.errors import UsageError
    from shared.model.pretrained import pretrained_part
    from shared.model.vae import decode_latents, load_decoder
    from shared.video import write_mp4

    sample = SampleReader(storage, collection, {key}, whole_up_to_bytes=0)
    if collection.kind != "latents" or key not in sample:
        raise UsageError(f"--decode: {key} is not a stored clip; give the key of one")
    model = Model(pretrained_model_name_or_path=checkpoint)
    if pretrained_part(model, "vae").sha256() != facts["recipe"]["vae"]["weights"]:
        raise UsageError(f"--decode {checkpoint}: another VAE encoded this clip; give the checkpoint of its recipe")
    vae = load_decoder(model, "auto", choose_device("auto"))
    mean = sample.read(key)["moments"].float().chunk(2)[0].transpose(0, 1)
    frames = decode_latents(vae, mean * vae.config.scaling_factor)
    first, last = facts["timestamps_us"][0], facts["timestamps_us"][-1]
    fps = round((len(facts["timestamps_us"]) - 1) * 1e6 / (last - first)) if last > first else 1
    return write_mp4(Path(f"{key}.mp4"), frames, max(1, fps))


@cache_app.command("verify")
@exits
def cache_verify(
    cache: CacheName = "cache",
    repair: Annotated[bool, typer.Option(help="Set damaged files aside; precompute makes them again.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Compare every file with its hashes, name and place; exit code 4 if anything is damaged."""
    import tempfile

    from shared.console import say, say_first, track
    from shared.errors import CacheError

    with (
        raise_on_signal("files that were set aside stay so"),
        tempfile.TemporaryDirectory(prefix="precog-verify-") as fresh,  # not the local copies of a remote cache
    ):
        from shared.cache.verify import verify

        storage = _open_cache(cache, local_cache_gib=0, local_folder=Path(fresh))
        checked, damaged = verify(storage, repair=repair, track=track("files"))
    if json_output:
        typer.echo(json.dumps({"shards": checked, "damaged": damaged, "repaired": repair and bool(damaged)}))
    say_first(f"{'set aside' if repair else 'damaged'}: {line}" for line in damaged)
    if damaged and not repair:
        raise CacheError(f"{cache}: {checked} shards checked, {len(damaged)} damaged; add --repair to set them aside")
    say(f"{cache}: {checked} shards checked, {len(damaged)} {'set aside' if repair else 'damaged'}")


@cache_app.command("gc")
@exits
def cache_gc(
    cache: CacheName = "cache",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted.")] = False,
    min_age_hours: Annotated[float, typer.Option(min=0, help="Keep younger files, which a run may be writing.")] = 24,
    json_output: JsonOutput = False,
) -> None:
    """Delete what no view names: shards, collections, litter; never another writer's fresh files."""
    from shared.console import bytes_text, say, track

    with raise_on_signal("only garbage was deleted"):
        from shared.cache.garbage import find_garbage, remove_garbage

        storage = _open_cache(cache)
        found = find_garbage(storage, min_age_hours * 3600)
        _say_foreign(found.foreign)
        for reason, count in sorted(Counter(found.files.values()).items()):
            size = sum(found.sizes[name] for name, why in found.files.items() if why == reason)
            say(f"{reason}: {count} files, {bytes_text(size)}")
        if found.unfinished:
            say(
                f"{found.unfinished} shards that no view names are kept: a run younger than {min_age_hours:g} hours "
                "may need them; --min-age-hours 0 deletes them if none is going on"
            )
        if not dry_run:
            remove_garbage(storage, found, track("deleting"))
    total = sum(found.sizes.values())
    say(f"{cache}: {len(found.files)} files of {bytes_text(total)} {'would be ' if dry_run else ''}deleted")
    if json_output:
        typer.echo(json.dumps({"files": found.files, "bytes": total, "kept": found.unfinished, "deleted": not dry_run}))


@cache_app.command("pull")
@exits
def cache_pull(
    url: OtherCache, cache: CacheName = "cache", replace: Replace = False, json_output: JsonOutput = False
) -> None:
    """Copy the shards and views of another cache that this one lacks, verified; run it again to resume."""
    _transfer(url, cache, replace, json_output)


@cache_app.command("push")
@exits
def cache_push(
    url: OtherCache,
    cache: CacheName = "cache",
    replace: Replace = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new data set on the hub public.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Copy this cache's shards and views that another one lacks, verified; run it again to resume."""
    if not url.startswith("hf://datasets/"):
        _transfer(cache, url, replace, json_output)
        return
    from shared.console import quiet_libraries, say, track

    with raise_on_signal("the files sent so far are stored"):
        from shared.cache.hub import push_to_hub

        quiet_libraries()
        page = push_to_hub(_open_cache(cache), url, public=public, track=track("files"))
    say(page)
    if json_output:
        typer.echo(json.dumps({"url": page}))


def _transfer(source_name: str, target_name: str, replace: bool, json_output: bool) -> None:
    from shared.console import bytes_text, say, track

    with raise_on_signal("the shards copied so far are stored"):
        from shared.cache.storage import open_storage
        from shared.cache.transfer import find_transfer, transfer

        source, target = _open_cache(source_name), open_storage(target_name)
        found = find_transfer(source, target)
        views = [*found.views, *(found.different if replace else [])]
        _say_foreign(found.foreign)
        say(f"copying {len(found.shards)} shards of {bytes_text(found.num_bytes)} and {len(views)} views")
        transfer(source, target, found, views, track("shards"))
    kept = [] if replace else found.different
    for name in kept:
        say(f"datasets/{name}: {target_name} has another view of this name, which was kept; --replace replaces it")
    if json_output:
        copied = {"shards": len(found.shards), "bytes": found.num_bytes, "views": views, "kept": kept}
        typer.echo(json.dumps(copied))
