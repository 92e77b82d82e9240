"""`precog sweep`: train one LoRA per combination of settings, each in its own process, all on one cache."""

import csv
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from shared import console
from shared.atomic_files import replacing
from shared.cache.collection import read_recipe
from shared.cache.staleness import stale_settings
from shared.cache.storage import open_storage
from shared.cache.view import read_view
from shared.config import Config, fields_shaping
from shared.config_file import dump_config, load_config
from shared.errors import CacheError, DataError, Preempted, UsageError
from shared.signals import StopSignal
from train.checkpoint.resume import is_finished
from train.events import PageProcess
from train.metrics import run_result

CSV_NAME = "sweep.csv"
TABLES = ("model", "train", "memory")
"""Tables that a grid may vary, but for fields that shape the cache: all runs must share clips, noise and timesteps."""
POLL_SECONDS = 0.2
"""Longest time until a signal is passed on to the children."""
STATUSES = {0: "finished", Preempted.exit_code: "stopped", -signal.SIGTERM: "stopped"}
"""Status by a child's exit code."""


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One combination of the grid."""

    name: str
    """The run folder's name, made of the values."""
    values: dict[str, str]
    """Field -> value, as written in the grid."""
    overrides: list[str]
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.train.output_dir


Row = dict[str, Any]
"""One run's line of sweep.csv: run, the grid's fields, status, step, the losses (None if missing) and seconds."""


def plan_sweep(path: Path, overrides: Sequence[str], grid: Sequence[str]) -> list[SweepRun]:
    """Return every combination of `grid`, a list of `table.field=v1,v2` in TOML values or bare words.

    Raises `UsageError` for a wrong field or value, and for two combinations that are the same run.
    """
    axes = [parse_axis(text) for text in grid]
    fields = [field for field, _ in axes]
    if repeated := [field for field in fields if fields.count(field) > 1]:
        raise UsageError(f"--grid {repeated[0]}: given twice; write all values in one --grid")
    parent = load_config(path, list(overrides)).train.output_dir
    runs: list[SweepRun] = []
    seen: dict[str, str] = {}
    for point in itertools.product(*(values for _, values in axes)):
        values = dict(zip(fields, point, strict=True))
        name = "_".join(f"{field.partition('.')[2]}={_file_name(value)}" for field, value in values.items())
        given = [*overrides, *(f"{field}={value}" for field, value in values.items())]
        for mark in (dump_config(load_config(path, given)), name):
            if mark in seen:
                raise UsageError(f"--grid: {name} and {seen[mark]} are the same run; leave one out")
            seen[mark] = name
        given.append(f"train.output_dir={_toml(str(parent / name))}")
        runs.append(SweepRun(name, values, given, load_config(path, given)))
    return runs


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Parse `train.lora_rank=16,64` to ("train.lora_rank", ["16", "64"]); lists are written in brackets."""
    field, separator, raw = text.partition("=")
    field = field.strip()
    table, _, name = field.partition(".")
    try:
        values = [_toml(value) for value in tomllib.loads(f"values = [{raw}]")["values"]]
    except tomllib.TOMLDecodeError:  # bare words
        values = [value.strip() for value in raw.split(",")]
    if not separator or not table or not name or not values or not all(values):
        raise UsageError(f"--grid {text!r}: expected table.field=value,value; write train.learning_rate=1e-4,3e-4")
    shared = fields_shaping("clips", "buckets", "view", "latents", "image_latents", "prompts")
    if table not in TABLES or field in ("train.output_dir", *shared):
        raise UsageError(f"--grid {field}: must be a field of {', '.join(TABLES)}, and not train.output_dir")
    return field, values


def run_sweep(path: Path, runs: Sequence[SweepRun], jobs: int, stop: StopSignal) -> list[Row]:
    """Train the runs that are not finished, `jobs` at a time, and write sweep.csv; return its rows, best first.

    A run that fails does not stop the other runs. Raises `CacheError` before anything starts if the view is missing or
    does not fit the config, and `Preempted` after a signal, once every child has saved a checkpoint.
    """
    config, folder = runs[0].config, runs[0].folder.parent
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    view = read_view(storage, config.data.name)
    for problem in stale_settings(config, view, *(read_recipe(storage, kind) for kind in (view.latents, view.prompts))):
        raise CacheError(problem)
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if not is_finished(run.config)]
    statuses = {run.name: "stopped" if run in waiting else "finished" for run in runs}
    devices = list(itertools.islice(itertools.cycle(visible_devices() or [""]), jobs))
    children: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
    told = False
    while children or (waiting and not stop.requested):
        while waiting and devices and not stop.requested:
            run, device = waiting.pop(0), devices.pop(0)
            children[run.name] = start_run(path, run, device), device
        if stop.requested and not told:
            for child, _ in children.values():
                child.terminate()  # no signal is sent to a child that has ended
            told = True
        for name, (child, device) in list(children.items()):
            if (code := child.poll()) is not None:
                statuses[name] = STATUSES.get(code, f"exit code {code}, see log.txt")
                console.say(f"{name}: {statuses[name]}")
                devices.append(device)
                del children[name]
        time.sleep(POLL_SECONDS)
    rows = sorted((read_row(run, statuses[run.name]) for run in runs), key=_rank)
    with replacing(folder / CSV_NAME) as temporary, temporary.open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    PageProcess(folder, "sweep.html").write_last()
    stop.check(f"{sum(row['status'] == 'finished' for row in rows)} of {len(rows)} runs are finished")
    return rows


def start_run(path: Path, run: SweepRun, device: str) -> "subprocess.Popen[bytes]":
    """Train a run in a process of its own, on the GPU `device` if it is not empty, with its output in log.txt."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "precog", "train", str(path), *run.overrides]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
    console.say(f"{run.name}: started")
    with (run.folder / "log.txt").open("ab") as log:
        # its own session, so that Ctrl-C reaches the child only once, through this process
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def visible_devices() -> list[str]:
    """Return the GPUs that the jobs may use, named as in CUDA_VISIBLE_DEVICES; empty on a CPU."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name for name in listed.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def read_row(run: SweepRun, status: str) -> Row:
    """Read the run's metrics; `loss` is the EMA loss of the last step."""
    found: dict[str, Any] = {}
    with suppress(DataError):
        found = run_result(run.folder)
    row = {"run": run.name, **run.values, "status": status, "step": found.get("steps") or 0}
    row |= {name: found.get(name) for name in ("held_out_loss", "base_held_out_loss")}
    return row | {"loss": found.get("ema_loss"), "seconds": round(found.get("seconds", 0), 3)}


def show_rows(rows: Sequence[Row], path: Path) -> None:
    """Print one line per run, best first."""
    shown = []
    for row in rows:
        losses = [row[name] for name in ("held_out_loss", "base_held_out_loss", "loss")]
        held_out, base, loss = ("-" if value is None else f"{value:.5f}" for value in losses)
        line = f"held out {held_out} (base {base}), loss {loss}, {row['step']} steps, {row['status']}"
        shown.append((row["run"], line))
    console.table(f"Sweep, best first; also in {path}", shown)


def _rank(row: Row) -> tuple[bool, float, float]:
    held_out, loss = (float("inf") if row[name] is None else row[name] for name in ("held_out_loss", "loss"))
    return row["status"] != "finished", held_out, loss


def _toml(value: Any) -> str:
    return tomli_w.dumps({"value": value}).partition("=")[2].strip()


def _file_name(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-.") or "empty"
