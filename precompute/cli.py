"""`precog precompute`. Everything heavy is imported inside the commands."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shared.command import ConfigFile, JsonOutput, Overrides, exits
from shared.signals import raise_on_signal

if TYPE_CHECKING:
    from precompute.report import Report
    from shared.config import Config

app = typer.Typer()

show_page: "Callable[[Config, str], None] | None" = None
"""Function called after the run with the config and its file's name; precog.py sets it to the data page's writer."""
MAX_PAGE_CLIPS = 20_000
"""Clips up to which the page is written unasked; it takes some 5 ms of CPU a clip, and a rerun far less."""


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
    """Encode the config's videos and captions into the cache; stored clips are reused."""
    from shared.config_file import load_config
    from shared.launcher import rank

    with raise_on_signal("finished shards are stored"):
        settings = load_config(config, overrides)
        report = _precompute(settings, part, engine)
    _show_report(report, settings)
    if show_page is not None and rank() == 0:
        if report.clips <= MAX_PAGE_CLIPS:
            show_page(settings, str(config))
        else:
            todo = f"run `precog report data {config}`"
            typer.echo(f"data page: not written for {report.clips:,} clips; {todo}", err=True)
    if json_output:
        typer.echo(json.dumps(report.as_json()))


def _precompute(config: "Config", part: str, engine: str) -> "Report":
    from shared.console import quiet_libraries, show_config
    from shared.errors import UsageError
    from shared.launcher import rank, world_size

    if engine == "ray" and (part or world_size() > 1):
        raise UsageError("--engine ray: divides the work itself; start it once, without --part and without a launcher")
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part or f"{rank() + 1}/{world_size()}")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part {part!r}: expected a share such as 3/16, from 1/16 to 16/16")
    show_config(config)
    from precompute.assignments import Part
    from precompute.ray_engine import precompute_with_ray
    from precompute.run import precompute
    from shared.device import choose_device

    quiet_libraries()
    if engine == "ray":
        return precompute_with_ray(config)
    choose_device(config.precompute.device)  # refused before all files are probed
    return precompute(config, Part(int(match[1]) - 1, int(match[2])))


def _show_report(report: "Report", config: "Config") -> None:
    from shared.console import bytes_text, say, say_first, table

    seconds = Counter(report.seconds)
    waited = {
        name: f"the encoder waited {seconds[f'wait_for_{name}']:.1f}, {report.waited_share(name):.0%} of its time"
        for name in ("decode", "write")
    }
    table(
        f"Cache {config.precompute.cache}",
        [
            ("clips", report.clips),
            ("latents encoded", report.latents),
            ("prompts encoded", report.prompts),
            *_count_by_kind(report.skipped),
            ("written", bytes_text(report.written_bytes)),
            ("clips per second", f"{report.clips_per_second:.2f}"),
            ("seconds encoding", f"{seconds['encode_latents']:.1f} video, {seconds['encode_prompts']:.1f} text"),
            *((f"seconds in {name}", f"{seconds[name]:.1f} ({waited[name]})") for name in waited),
            ("seconds in total", f"{seconds['total']:.1f}"),
        ],
    )
    say_first(f"skipped {source}: {reason}" for source, reason in report.skipped)
    if report.retryable and not config.precompute.retry_skipped:
        say(f"precompute.retry_skipped=true tries {report.retryable} of the skipped clips again.")
    if not report.latents.made and not report.prompts.made:
        but = "but the skipped clips " if report.skipped else ""
        say(f"Nothing was encoded: everything {but}is stored already.")


def _count_by_kind(skipped: Iterable[tuple[str, str]]) -> list[tuple[str, int]]:
    """Count the skipped clips per kind of reason, the part before its first colon."""
    return sorted(Counter(f"skipped: {reason.partition(':')[0]}" for _, reason in skipped).items())


def show_plan(config: "Config") -> dict[str, Any]:
    """Print stage 1's half of `precog plan` and return its JSON object; nothing is written.

    Raise `DataError` if every clip is skipped.
    """
    from shared.console import bytes_text, say, say_first, table
    from shared.errors import DataError

    with raise_on_signal("nothing was written"):
        from precompute.discover import open_stage
        from precompute.estimate import estimate
        from shared.media.pool import decode_pool

        with decode_pool(config.precompute) as pool:
            found = estimate(open_stage(config), pool)
    changes = sorted(Counter(reason for _, reason in found.changed).items())
    unused, prompts_changed = found.orphaned, found.prompts_recipe_changed
    unused_bytes = bytes_text(unused["bytes"])
    sizes = zip(("disk needed", "stored", "disk free"), found.bytes.values(), strict=True)
    table(
        f"Plan for cache {config.precompute.cache}",
        [
            ("clips", found.clips),
            ("latents to encode", found.latents),
            ("  new", found.new),
            *((f"  {reason}", count) for reason, count in changes),
            ("prompts to encode", found.prompts),
            *([("  recipe changed", ", ".join(prompts_changed))] if prompts_changed else []),
            *_count_by_kind(found.skipped),
            ("shards to make", f"{found.shards['latents']} of clips, {found.shards['prompts']} of prompts"),
            *((name, "unknown" if size is None else bytes_text(size)) for name, size in sizes),
            ("used by no data set", f"{unused['latents']} latents, {unused['prompts']} prompts, {unused_bytes}"),
        ],
    )
    for line in (*found.warnings, *found.findings):
        say(f"warning: {line}")
    say_first(f"skipped {source}: {reason}" for source, reason in found.skipped)
    if not found.clips:
        raise DataError(f"data.name = {config.data.name!r}: every clip is skipped; replace the files named above")
    return found.as_json()
