"""`precog sweep`: one process per run of a grid, all on one cache; what is finished stays, what was cut off goes on."""

import csv
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tomli_w

from shared import console
from shared.atomic_files import replacing
from shared.cache.collection import read_recipe
from shared.cache.staleness import stale_settings
from shared.cache.storage import open_storage
from shared.cache.view import View, read_view
from shared.config import Config, dump_config, load_config
from shared.errors import CacheError, DataError, PrecogError, Preempted, UsageError
from shared.model.pretrained import FileMark, Part, present_part
from shared.signals import StopSignal
from train.checkpoint.identity import Base, base_key, identify_base
from train.export import BASE_KEY, CONFIG_KEY, VIEW_KEY, config_key, read_provenance
from train.metrics import read_metrics, smoothed

CSV_NAME = "sweep.csv"
TABLES = ("model", "train")
"""What a grid may vary: the rest decides what is in the cache, which all runs share."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One point of the grid."""

    name: str
    """Of its folder: the values that set it apart."""
    values: dict[str, str]
    """Field -> value, as written in the grid."""
    overrides: list[str]
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.train.output_dir


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run."""

    run: SweepRun
    status: str
    """finished, or how it ended instead."""
    step: int
    held_out_loss: float | None
    base_held_out_loss: float | None
    loss: float | None
    """Mean of the last steps."""
    seconds: float
    """Of its optimizer steps."""


def plan_sweep(path: Path, overrides: Sequence[str], grid: Sequence[str]) -> list[SweepRun]:
    """The runs of a grid, every config checked. Raises `UsageError` before anything runs.

    `grid` holds `table.field=v1,v2`; values are TOML or bare words, and lists stand in brackets.
    """
    axes = [parse_axis(text) for text in grid]
    fields = [field for field, _ in axes]
    if twice := sorted({field for field in fields if fields.count(field) > 1}):
        raise UsageError(f"--grid {twice[0]}: given twice")
    parent = load_config(path, list(overrides)).train.output_dir
    runs: list[SweepRun] = []
    for point in itertools.product(*(values for _, values in axes)):
        values = dict(zip(fields, point, strict=True))
        name = "_".join(f"{field.partition('.')[2]}={_file_name(value)}" for field, value in values.items())
        given = [*overrides, *(f"{field}={value}" for field, value in values.items())]
        given.append(f"train.output_dir={_toml(str(parent / name))}")
        runs.append(SweepRun(name, values, given, load_config(path, given)))
    seen: dict[str, str] = {}
    for run in runs:
        elsewhere = run.config.train.model_copy(update={"output_dir": parent})
        settings = dump_config(run.config.model_copy(update={"train": elsewhere}))
        for mark in (settings, run.name):
            if mark in seen:
                raise UsageError(f"--grid: {run.name} and {seen[mark]} are the same run; leave one out")
            seen[mark] = run.name
    return runs


def parse_axis(text: str) -> tuple[str, list[str]]:
    """`train.lora_rank=16,64` -> ("train.lora_rank", ["16", "64"])."""
    field, separator, raw = text.partition("=")
    table, _, name = field.strip().partition(".")
    values = _split(raw)
    if not separator or not table or not name or not values or not all(values):
        raise UsageError(f"--grid {text!r}: write it as table.field=value,value such as train.learning_rate=1e-4,3e-4")
    if table not in TABLES or field.strip() == "train.output_dir":
        raise UsageError(f"--grid {field.strip()}: a sweep varies {' and '.join(TABLES)}, but not train.output_dir")
    return field.strip(), values


def run_sweep(path: Path, runs: Sequence[SweepRun], jobs: int, stop: StopSignal) -> list[Outcome]:
    """Run what is not finished, `jobs` at a time, and write sweep.csv beside the run folders; outcomes best first.

    A run that fails does not stop the others. Raises `Preempted` after a signal, when the runs have saved themselves.
    """
    devices = visible_devices()
    view_hash = current_view(runs[0].config).hash
    pending = [run for run in runs if not is_finished(run, view_hash)]
    for run in runs:
        if run not in pending:
            console.say(f"{run.name}: finished before")
    running: dict[int, tuple[SweepRun, subprocess.Popen[bytes]]] = {}
    codes: dict[str, int] = {}
    passed_on = False
    while pending or running:
        for slot in range(jobs):
            if slot not in running and pending and not stop.requested:
                run = pending.pop(0)
                running[slot] = (run, start_run(path, run, devices[slot % len(devices)] if devices else None))
                console.say(f"{run.name}: started")
        time.sleep(POLL_SECONDS)
        for slot, (run, process) in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[slot]
                codes[run.name] = code
                console.say(f"{run.name}: {_ending(code)}")
        if stop.requested:
            pending.clear()
            if not passed_on:
                for _, process in running.values():
                    process.terminate()
                passed_on = True
    outcomes = sorted((outcome_of(run, codes.get(run.name), view_hash) for run in runs), key=_rank)
    write_csv(outcomes, runs[0].folder.parent / CSV_NAME)
    stop.check(f"{sum(outcome.status == 'finished' for outcome in outcomes)} of {len(runs)} runs are finished")
    return outcomes


def start_run(path: Path, run: SweepRun, device: str | None) -> subprocess.Popen[bytes]:
    """`precog train` in a session of its own, so that Ctrl-C reaches it once, through us; output to log.txt."""
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with (run.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "precog", "train", str(path), *run.overrides],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def visible_devices() -> list[str]:
    """The GPUs to deal out among the jobs, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name for name in listed.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def current_view(config: Config) -> View:
    """The view that all runs train on. Raises `CacheError` if it is not there or of other settings."""
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    view = read_view(storage, config.data.name)
    for problem in stale_settings(config, view, *(read_recipe(storage, kind) for kind in (view.latents, view.prompts))):
        raise CacheError(problem)
    return view


def is_finished(run: SweepRun, view_hash: str) -> bool:
    """The run folder has the export of this very config, view and base model."""
    found = read_provenance(run.folder)
    if (found.get(CONFIG_KEY), found.get(VIEW_KEY)) != (config_key(run.config), view_hash):
        return False
    transformer = present_part(run.config.model, "transformer")
    if transformer is None:
        return False
    return found.get(BASE_KEY) == base_key(transformer, _base_of(transformer, transformer.marks))


@lru_cache
def _base_of(transformer: Part, _marks: tuple[FileMark, ...]) -> Base:
    """Reads local weights whole, once for all runs."""
    return identify_base(transformer, None)


def outcome_of(run: SweepRun, code: int | None, view_hash: str) -> Outcome:
    """Read what the run wrote; `code` is its process's exit code, if one ran now."""
    try:
        lines = read_metrics(run.folder)
    except DataError:
        lines = []
    status = _ending(code) if code else "finished" if is_finished(run, view_hash) else "not finished"
    return Outcome(
        run,
        status,
        lines[-1]["step"] if lines else 0,
        next((line["held_out_loss"] for line in reversed(lines) if "held_out_loss" in line), None),
        next((line["base_held_out_loss"] for line in lines if "base_held_out_loss" in line), None),
        smoothed(lines)[-1] if lines else None,
        sum(line["seconds"] for line in lines),
    )


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """One row per run, best first."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["run", *outcomes[0].run.values, "status", "step", "held_out_loss", "base_held_out_loss", "loss", "seconds"]
    )
    for outcome in outcomes:
        measured = (outcome.held_out_loss, outcome.base_held_out_loss, outcome.loss)
        shown = ["" if value is None else repr(value) for value in measured]
        row = [outcome.run.name, *outcome.run.values.values(), outcome.status, outcome.step, *shown]
        writer.writerow([*row, f"{outcome.seconds:.3f}"])
    with replacing(path) as pending:
        pending.write_text(stream.getvalue(), encoding="utf-8")


def show_outcomes(outcomes: Sequence[Outcome], path: Path) -> None:
    """The table at the end. Raises `PrecogError` if a run failed."""
    rows: list[tuple[str, Any]] = [
        (
            outcome.run.name,
            f"held out {_shown(outcome.held_out_loss)} (base {_shown(outcome.base_held_out_loss)}), "
            f"loss {_shown(outcome.loss)}, {outcome.step} steps, {outcome.status}",
        )
        for outcome in outcomes
    ]
    console.table(f"Sweep, best first; also in {path}", rows)
    if failed := [outcome for outcome in outcomes if outcome.status != "finished"]:
        log = failed[0].run.folder / "log.txt"
        raise PrecogError(
            f"{len(failed)} of {len(outcomes)} runs did not finish, see {log}; the same command tries them again"
        )


def _ending(code: int) -> str:
    """How a run's process ended; by SIGTERM itself if it came before anything was trained."""
    if code in (Preempted.exit_code, -signal.SIGTERM):
        return "stopped"
    return "finished" if code == 0 else f"exit code {code}, see log.txt"


def _rank(outcome: Outcome) -> tuple[bool, float, float]:
    missing = float("inf")
    held_out = missing if outcome.held_out_loss is None else outcome.held_out_loss
    return outcome.status != "finished", held_out, missing if outcome.loss is None else outcome.loss


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _split(raw: str) -> list[str]:
    """At the commas outside brackets and quotes."""
    try:
        return [_toml(value) for value in tomllib.loads(f"values = [{raw}]")["values"]]
    except tomllib.TOMLDecodeError:
        return [value.strip() for value in raw.split(",")]


def _toml(value: Any) -> str:
    return tomli_w.dumps({"value": value}).partition("=")[2].strip()


def _file_name(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-.") or "empty"
