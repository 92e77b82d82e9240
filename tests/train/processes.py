"""Training in real processes: forked from one that has torch imported, because to import it takes longer than to train.

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
from train.loop import run_steps, train

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.loop", "tests.train.processes"])
DEADLINE_SECONDS = 120


class Stopping(StopSignal):
    """A signal that comes when it is asked about for the `number`th time (from 1): by a step, or by what it calls.

    Each step asks once; the others are an evaluation's clips and a preview's steps.
    """

    def __init__(self, number: int, *, by_step: bool = True) -> None:
        self._polls, self._number, self._by_step = 0, number, by_step
        super().__init__()

    @property
    def requested(self) -> bool:
        self._polls += (sys._getframe(1).f_code is run_steps.__code__) == self._by_step
        return self._polls >= self._number and self.comes()

    @requested.setter
    def requested(self, value: bool) -> None:
        pass

    def comes(self) -> bool:
        """What happens then."""
        return True


class KilledInStep(Stopping):
    """SIGKILLs this process between the gradients and the update of its `number`th step (from 1)."""

    def comes(self) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return False


def start(
    config: Config,
    world_size: int = 1,
    killed_in_step: int | None = None,
    largest_file_bytes: int | None = None,
    configs: Mapping[int, Config] | None = None,
) -> list[BaseProcess]:
    """Processes that train `config` together, rank by rank, but for the ranks that `configs` gives another.

    A disk that is full is one that takes no larger file.
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
            target=_run, args=((configs or {}).get(rank, config), environment, killed_in_step, largest_file_bytes)
        )
        for rank, environment in enumerate(environments)
    ]
    for child in children:
        child.start()
    return children


def finish(children: list[BaseProcess], *, others_follow: bool = True) -> list[int | None]:
    """Exit codes; negative for signals. When one has failed, the others are killed, as launchers do, if they follow."""
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


def run(config: Config, world_size: int = 1, killed_in_step: int | None = None) -> list[int | None]:
    """Start and finish."""
    return finish(start(config, world_size, killed_in_step))


def log(config: Config, rank: int = 0) -> str:
    """What a child printed."""
    return _log_path(config, str(rank)).read_text(encoding="utf-8")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def _log_path(config: Config, rank: str) -> Path:
    return config.train.output_dir.with_suffix(f".{rank}.log")


def _run(
    config: Config, environment: dict[str, str], killed_in_step: int | None, largest_file_bytes: int | None
) -> None:
    import torch

    from shared.console import run_command

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
            if killed_in_step is not None:
                train(config, KilledInStep(killed_in_step))
                return
            with StopSignal() as stop:
                train(config, stop)

        run_command(body)
