"""Training in real processes, forked from one that has imported torch, because the import takes longer than training.

A child runs what `precog train` runs, with the environment that a launcher would set, and ends with its exit code.
"""

import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from shared.config import Config
from shared.signals import StopSignal
from train.loop import train

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.loop", "tests.train.processes"])
DEADLINE_SECONDS = 120


class StopAt(StopSignal):
    """A signal that comes at the `poll`-th question (from 1) after `step` lines of metrics.jsonl; SIGKILL if `kill`.

    Questions are asked once by each training step, by each clip of an evaluation and by each step of a preview.
    """

    def __init__(self, run: Path, step: int, poll: int = 1, *, kill: bool = False) -> None:
        self._metrics, self._step, self._polls, self._kill = run / "metrics.jsonl", step, poll, kill
        super().__init__()

    @property
    def requested(self) -> bool:
        if self._metrics.exists() and self._metrics.read_bytes().count(b"\n") >= self._step:
            self._polls -= 1
            if self._polls <= 0 and self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._polls <= 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


def start(
    config: Config,
    world_size: int = 1,
    killed_after_step: int | None = None,
    largest_file_bytes: int | None = None,
    configs: Mapping[int, Config] | None = None,
) -> list[BaseProcess]:
    """Start processes that train `config`; `configs` gives some ranks another config.

    A process with `killed_after_step` kills itself in the step after it. `largest_file_bytes` acts as a full disk.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environments = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if world_size > 1
        else {}
        for rank in range(world_size)
    ]
    children: list[BaseProcess] = [
        CONTEXT.Process(
            target=_run, args=((configs or {}).get(rank, config), environment, killed_after_step, largest_file_bytes)
        )
        for rank, environment in enumerate(environments)
    ]
    for child in children:
        child.start()
    return children


def finish(children: list[BaseProcess], *, others_follow: bool = True) -> list[int | None]:
    """Return exit codes, negative for signals; with `others_follow`, a failure kills the rest, as a launcher does."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while any(child.is_alive() for child in children):
        dead = any(child.exitcode is not None and child.exitcode != 0 for child in children)
        assert time.monotonic() < deadline, "the processes hang"
        if dead and others_follow:
            time.sleep(0.2)
            for child in children:
                child.kill()
        time.sleep(0.01)
    return [child.exitcode for child in children]


def run(config: Config, world_size: int = 1, killed_after_step: int | None = None) -> list[int | None]:
    """Start the processes and return their exit codes."""
    return finish(start(config, world_size, killed_after_step))


def log(config: Config, rank: int = 0) -> str:
    """Return the output of a child."""
    return _log_path(config, str(rank)).read_text(encoding="utf-8")


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds; fail after two minutes."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def _log_path(config: Config, rank: str) -> Path:
    return config.train.output_dir.with_suffix(f".{rank}.log")


def _run(
    config: Config, environment: dict[str, str], killed_after_step: int | None, largest_file_bytes: int | None
) -> None:
    import torch

    from shared.command import exits

    os.environ |= environment
    if largest_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
    torch.set_num_threads(1)
    path = _log_path(config, environment.get("RANK", "0"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        from shared import console

        console.console.file = stream

        def body() -> None:
            if killed_after_step is not None:
                train(config, StopAt(config.train.output_dir, killed_after_step, kill=True))
                return
            with StopSignal() as stop:
                train(config, stop)

        exits(body)()
