"""Processes of one machine that stream the same frozen weights have them in memory once, and leave nothing behind."""

import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from shared.config import Config, Memory
from shared.model.geometry import Bucket
from tests.tiny import build_transformer
from tests.train.memory.test_choice import config_of
from tests.train.processes import CONTEXT, DEADLINE_SECONDS, log
from tests.train.processes import run as run_together
from tests.train.transformer.test_forward import conventions_of, make_clips, run
from train.memory import choice as memory
from train.memory.choice import GIB, choose_plan
from train.transformer import host_memory as transfer
from train.transformer.engine import Plan, open_engine
from train.transformer.forward import predict
from train.transformer.weight_streaming import frozen_weights

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"num_layers": 6, "num_attention_heads": 32, "time_embed_dim": 16}
WEIGHT_BYTES = 6 * 12 * (32 * 16) ** 2 * 4
"""75 MB, far more than what else comes and goes."""

Question = Callable[..., Iterator[Any]]


@contextmanager
def processes(count: int, question: Question, *arguments: Any) -> Iterator[Callable[[], list[Any]]]:
    """`count` processes in one group answer together; the call gives each one's next answer. Killed in the end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"tcp://localhost:{probe.getsockname()[1]}"
    pipes, children = [], []
    for rank in range(count):
        ours, theirs = CONTEXT.Pipe()
        children.append(CONTEXT.Process(target=_answer, args=(theirs, address, rank, count, question, *arguments)))
        children[-1].start()
        pipes.append(ours)

    def answers() -> list[Any]:
        assert all(pipe.poll(DEADLINE_SECONDS) for pipe in pipes), "the processes hang"
        return [pipe.recv() for pipe in pipes]

    try:
        yield answers
    finally:
        for child in children:
            child.kill()
            child.join()
    assert [child.exitcode for child in children] == [-signal.SIGKILL] * count


def _answer(pipe: Connection, address: str, rank: int, count: int, question: Question, *arguments: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    for answer in question(rank, *arguments):
        pipe.send(answer)
    signal.pause()


def train_and_weigh(rank: int, fault: str = "") -> Iterator[Any]:
    """Loss, gradients and warnings; then this process's share of the machine's memory, when all have touched all."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("train.transfer").addHandler(handler)
    if fault == "no room":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (WEIGHT_BYTES // 2, WEIGHT_BYTES // 2))
    if fault == "slow":
        opened = transfer._opened
        transfer._opened = lambda *arguments: (time.sleep(0.5), opened(*arguments))[1]
    if fault == "hidden":
        transfer._opened = lambda path, *_: os.open(path.replace("/fd/", "/no/"), os.O_RDWR)  # type: ignore[assignment]
    transformer = build_transformer("5b", lora_rank=4, **SHAPE)
    if rank > 0 and not fault:  # what it computes with are the first process's
        for block in transformer.transformer_blocks:
            for value in frozen_weights(block):
                value.data.zero_()
    engine = open_engine(transformer, Plan("attention_output", stream_weights=2), CPU)
    clips = make_clips(conventions_of("5b"), torch.float32, 2)
    _, loss, gradients = run(transformer, lambda: predict(transformer, clips, conventions_of("5b"), engine))
    yield float(loss), {name: value.numpy() for name, value in gradients.items()}, told
    del gradients
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    distributed.barrier()
    # of the proportional set size: a page of n processes counts 1/n in each
    fields = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    share = next(int(line.split()[1]) for line in fields if line.startswith("Pss:")) * 1024
    distributed.barrier()  # who ends gives the weights back, and the others' shares of them grow
    yield share


def large_shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.is_file() and path.stat().st_size > 2**20}


@pytest.fixture(scope="module")
def alone() -> tuple[float, dict[str, np.ndarray]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loss, gradients, _ = next(train_and_weigh(0))
    torch.set_num_threads(threads)
    return loss, gradients


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.faults), 3])
def test_the_weights_are_there_once_and_gradients_are_those_of_one_process(
    count: int, alone: tuple[float, dict[str, np.ndarray]]
) -> None:
    before = large_shared_files()
    sizes = {}
    for fault in ("", "no room"):
        with processes(count, train_and_weigh, fault) as answers:
            found = answers()
            assert_same_as(alone, found)
            warnings = [line for *_, told in found for line in told]
            assert [line for line in warnings if "cannot be shared on this machine" in line] == warnings
            assert len(warnings) == (1 if fault else 0)
            sizes[fault] = sum(answers())
            assert large_shared_files() == before, "nothing that a crash could leave"
        assert large_shared_files() == before
    assert sizes["no room"] - sizes[""] == pytest.approx((count - 1) * WEIGHT_BYTES, rel=0.1)


@pytest.mark.faults
def test_the_first_keeps_the_door_open_for_a_slow_one(alone: tuple[float, dict[str, np.ndarray]]) -> None:
    with processes(2, train_and_weigh, "slow") as answers:
        found = answers()
        assert_same_as(alone, found)
        assert not any(told for *_, told in found)


@pytest.mark.faults
def test_a_process_that_cannot_see_the_first_keeps_its_own_copy(alone: tuple[float, dict[str, np.ndarray]]) -> None:
    with processes(2, train_and_weigh, "hidden") as answers:
        first, second = answers()
        assert_same_as(alone, [first, second])
        assert not first[2] and len(second[2]) == 1 and "cannot be shared on this machine" in second[2][0]


def assert_same_as(alone: tuple[float, dict[str, np.ndarray]], found: list[Any]) -> None:
    loss, expected = alone
    for its_loss, gradients, _ in found:
        assert its_loss == loss and gradients.keys() == expected.keys()
        assert all(np.array_equal(value, expected[name]) for name, value in gradients.items())


def choose(rank: int) -> Iterator[Any]:
    """The plan and what is said about it, where rank 1 has little free."""
    memory.free_bytes = lambda device: GIB if rank == 0 else 1  # type: ignore[assignment]
    transformer = build_transformer("5b", lora_rank=4)
    yield choose_plan(config_of({}), transformer, conventions_of("5b"), [Bucket(9, 64, 96)], CPU)


def test_all_processes_take_the_plan_that_the_fullest_device_needs() -> None:
    with processes(2, choose) as answers:
        assert {plan.activations for plan in answers()} == {"block_input"}


@pytest.mark.faults
def test_a_run_of_two_processes_that_stream_is_the_run_of_one(settings: Callable[..., Config]) -> None:
    memory_fields = Memory(activations="attention_output", stream_weights=2)
    exports = []
    for name, world_size in (("one", 1), ("two", 2)):
        config = settings(name, max_train_steps=3).model_copy(update={"memory": memory_fields})
        assert run_together(config, world_size) == [0] * world_size, log(config)
        assert "cannot be shared" not in log(config)
        exports.append(load_file(config.train.output_dir / "export" / "pytorch_lora_weights.safetensors"))
    for name, tensor in exports[0].items():
        torch.testing.assert_close(tensor, exports[1][name], rtol=0, atol=1e-4)


def test_memory_is_unpinned_once_nothing_uses_it_and_before_it_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a GPU would do written down."""
    log: list[tuple[str, int]] = []

    def unpin(address: int) -> None:
        ctypes.string_at(address, 5000)  # would be a segmentation fault
        log.append(("unpinned", address))

    monkeypatch.setattr(transfer, "pin", lambda address, num_bytes: log.append((f"{num_bytes} pinned", address)))
    monkeypatch.setattr(transfer, "unpin", unpin)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(("waited", device.index)))
    buffer = transfer.host_empty(5000, torch.device("cuda", 1))
    address = buffer.data_ptr()
    part = buffer[10:20].view(torch.int16)
    del buffer
    gc.collect()
    assert log == [("5000 pinned", address)], "a view uses it"
    del part
    assert log[1:] == [("waited", 1), ("unpinned", address)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_of_any_size_is_pinned_as_long_as_it_is_used() -> None:
    cuda, size = torch.device("cuda"), 5 * 2**20 + 512
    descriptor = transfer._memory_file(size)
    for _ in range(3):  # the second would fail if the first were still registered at its address
        for values in (transfer._mapped(descriptor, size, cuda), transfer.host_empty(size, cuda)):
            assert values.is_pinned() and len(values) == size
            values.random_()
            assert values.to("cuda", non_blocking=True).cpu().equal(values)
    os.close(descriptor)
