"""`precog precompute` and `precog cache`. Everything heavy is imported inside the commands."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shared.command import ConfigFile, JsonOutput, Overrides, exits

if TYPE_CHECKING:
    from precompute.assignments import Part
    from precompute.estimate import Estimate
    from precompute.report import Report
    from shared.cache.storage import Storage
    from shared.config import Config, Precompute

MAX_LISTED = 20
"""Clips that are listed; --json and the view have all."""

app = typer.Typer()
cache_app = typer.Typer(help="Look at and check the cache.", no_args_is_help=True)

CacheName = Annotated[str, typer.Argument(help="Cache folder.")]


@app.command("precompute")
@exits
def precompute_command(
    config: ConfigFile,
    overrides: Overrides = None,
    json_output: JsonOutput = False,
    part: Annotated[str, typer.Option(help="This worker's share, such as 3/16 (1-based).")] = "",
    engine: Annotated[
        Literal["process", "ray"], typer.Option(help="This process alone, or a Ray worker on every GPU.")
    ] = "process",
) -> None:
    """Encode the config's videos and captions into the cache; what is stored already is reused."""
    import json

    from shared.config import load_config
    from shared.signals import raise_on_signal

    with raise_on_signal("finished shards are stored"):
        settings = load_config(config, overrides)
        report = _run(settings, part, engine)
    _show(report, settings.precompute)
    if json_output:
        print(json.dumps(report.as_json()))  # noqa: T201


def _run(config: "Config", part: str, engine: str) -> "Report":
    from precompute.assignments import Part
    from precompute.ray_engine import precompute_with_ray
    from precompute.run import precompute
    from shared.console import quiet_libraries, show_config
    from shared.device import choose_device
    from shared.errors import UsageError

    share = _share(part)
    if engine == "ray" and share != Part():
        raise UsageError("--engine ray divides the work itself: start it once, without --part and outside a launcher")
    quiet_libraries()
    show_config(config)
    if engine == "ray":
        return precompute_with_ray(config)
    choose_device(config.precompute.device)  # refused now if it is not there, not once all files have been probed
    return precompute(config, share)


def _share(part: str) -> "Part":
    """--part, or else the launcher's rank and world size."""
    import re

    from precompute.assignments import Part
    from shared.errors import UsageError
    from shared.launcher import rank, world_size

    if not part:
        return Part(rank(), world_size())
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part {part!r}: write it as 3/16, from 1/16 to 16/16")
    return Part(int(match[1]) - 1, int(match[2]))


def _show(report: "Report", settings: "Precompute") -> None:
    from shared.console import bytes_text, say, table

    def spent(name: str) -> str:
        return f"{report.seconds.get(name, 0.0):.1f}"

    def waited(name: str) -> str:
        return f"the encoder waited {spent(f'wait_for_{name}')}, {report.waited_share(name):.0%} of its time"

    table(
        f"Cache {settings.cache}",
        [
            ("clips", report.clips),
            ("latents encoded", report.latents),
            ("prompts encoded", report.prompts),
            *_kinds(report.skipped),
            ("captions cut short", len(report.truncated)),
            ("written", bytes_text(report.written_bytes)),
            ("clips per second", f"{report.clips_per_second:.2f}"),
            ("seconds decoding", f"{spent('decode')} ({waited('decode')})"),
            ("seconds encoding", f"{spent('encode_latents')} video, {spent('encode_prompts')} text"),
            ("seconds writing", f"{spent('write')} ({waited('write')})"),
            ("seconds in total", spent("total")),
        ],
    )
    _list(f"cut short {cut.source}, caption {cut.caption}: its last {cut.tokens} tokens" for cut in report.truncated)
    _list(f"skipped {source}: {reason}" for source, reason in report.skipped)
    if report.skipped and not settings.retry_skipped:
        say("precompute.retry_skipped=true tries the skipped clips again.")
    if not report.latents.made and not report.prompts.made:
        if report.skipped:
            say("Nothing was encoded: everything but the skipped clips is stored already.")
        else:
            say("Nothing to encode: everything is stored already.")


def _kinds(skipped: Iterable[tuple[str, str]]) -> list[tuple[str, int]]:
    """How many were skipped for each kind of reason, which is what comes before its first colon."""
    from collections import Counter

    return sorted(Counter(f"skipped: {reason.partition(':')[0]}" for _, reason in skipped).items())


def _list(lines: Iterable[str]) -> None:
    """The first ones, and how many more there are."""
    from shared.console import say

    every = list(lines)
    for line in every[:MAX_LISTED]:
        say(line)
    if len(every) > MAX_LISTED:
        say(f"... and {len(every) - MAX_LISTED} more")


def show_plan(config: "Config") -> dict[str, Any]:
    """Stage 1's half of `precog plan`: what `precompute` would do; nothing is written. The object of `--json`."""
    from precompute.estimate import estimate
    from precompute.run import decode_pool
    from precompute.stage import open_stage
    from shared.signals import raise_on_signal

    with raise_on_signal("nothing was written"), decode_pool(config) as pool:
        found = estimate(open_stage(config), pool)
    _show_plan(found, config.precompute.cache)
    return found.as_json()


def _show_plan(found: "Estimate", cache: str) -> None:
    from collections import Counter

    from shared.console import bytes_text, say, table

    reasons = Counter(reason for _, reason in found.changed)
    orphaned = found.orphaned
    table(
        f"Plan for cache {cache}",
        [
            ("clips", found.clips),
            ("latents to encode", found.latents),
            ("  new", found.new),
            *((f"  {reason}", count) for reason, count in sorted(reasons.items())),
            ("prompts to encode", found.prompts),
            *([("  recipe changed", ", ".join(found.prompts_recipe_changed))] if found.prompts_recipe_changed else []),
            *_kinds(found.skipped),
            ("shards to make", f"{found.shards['latents']} of clips, {found.shards['prompts']} of prompts"),
            ("disk needed", bytes_text(found.needed_bytes)),
            ("disk free", "unknown" if found.free_bytes is None else bytes_text(found.free_bytes)),
            ("stored", bytes_text(found.stored_bytes)),
            (
                "used by no data set",
                f"{orphaned['latents']} latents, {orphaned['prompts']} prompts, {bytes_text(orphaned['bytes'])}",
            ),
        ],
    )
    for line in found.warnings:
        say(f"warning: {line}")
    _list(f"skipped {source}: {reason}" for source, reason in found.skipped)


@cache_app.command("ls")
@exits
def cache_ls(cache: CacheName = "cache") -> None:
    """List the collections and views of a cache."""
    from shared.cache.collection import collections, read_recipe, shards
    from shared.cache.view import read_view, view_names
    from shared.console import bytes_text, table

    storage = _open_cache(cache)
    for collection in collections(storage):
        recipe = read_recipe(storage, collection)
        found = shards(storage, collection.folder)
        folders: dict[str, int] = {}
        for tar, receipt in found:
            bucket = tar.split("/")[2] if tar.count("/") == 3 else ""
            folders[bucket] = folders.get(bucket, 0) + len(receipt.samples)
        table(
            collection.folder,
            [
                ("precision", recipe.get("precision", "")),
                ("shards", len(found)),
                ("samples", sum(folders.values())),
                *((f"  {bucket}", count) for bucket, count in sorted(folders.items()) if bucket),
                ("size", bytes_text(sum(receipt.size for _, receipt in found))),
            ],
        )
    for name in view_names(storage):
        view = read_view(storage, name)
        table(
            f"datasets/{name}",
            [
                *((split, len(view.split(split))) for split in ("train", "held_out", "skipped")),
                ("latents", view.latents.recipe),
                ("prompts", view.prompts.recipe),
            ],
        )


def _open_cache(cache: str, **options: Any) -> "Storage":
    """Raises `UsageError` if nothing is there: a mistyped name is no empty cache."""
    from shared.cache.storage import open_storage
    from shared.errors import UsageError

    storage = open_storage(cache, **options)
    if not any(storage.files(folder) for folder in ("latents", "prompts", "datasets")):
        raise UsageError(f"{cache}: no cache is there; give the folder or URL of precompute.cache")
    return storage


@cache_app.command("verify")
@exits
def cache_verify(
    cache: CacheName = "cache",
    repair: Annotated[bool, typer.Option(help="Set damaged files aside; precompute makes them again.")] = False,
) -> None:
    """Read every shard, recipe and plan and compare shards with their receipts; exit code 4 if anything is damaged."""
    import tempfile

    from shared.cache.verify import verify
    from shared.console import say
    from shared.errors import CacheError

    with tempfile.TemporaryDirectory(prefix="precog-verify-") as fresh:  # not the local copies of a remote cache
        checked, damaged = verify(_open_cache(cache, local_cache_gib=0, local_folder=Path(fresh)), repair=repair)
    for line in damaged:
        fault, _, _ = line.partition("; `precog cache verify --repair`")  # which is being done, or advised below
        say(f"{'set aside' if repair else 'damaged'}: {fault}")
    if damaged and not repair:
        raise CacheError(f"{cache}: {checked} shards checked, {len(damaged)} damaged; add --repair to set them aside")
    say(f"{cache}: {checked} shards checked, {len(damaged)} {'set aside' if repair else 'damaged'}")
