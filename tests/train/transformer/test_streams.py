"""Copy streams on an emulated GPU: weight streaming and offload give the plain run's bits under every schedule."""

import inspect
import random
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from shared import host_memory
from tests.emulated_device import SCHEDULES, Choose, EmulatedGpu, Mutant
from tests.tiny import add_lora, build_transformer
from tests.train.transformer.parity import CPU, LEAN, PLANS, SHAPES, conventions_of, make_clip, run
from train.transformer import activation_offload, weight_streaming
from train.transformer.engine import EVERYTHING_RESIDENT, Engine, Plan, open_engine
from train.transformer.forward import predict

CONVENTIONS = conventions_of("5b")
PACKS = [[make_clip(CONVENTIONS, SHAPES[index], 1, torch.float32)] for index in (1, 4)]


def build() -> CogVideoXTransformer3DModel:
    return build_transformer("5b", torch.float32, lora_rank=2, num_layers=3).train()


def train(transformer: CogVideoXTransformer3DModel, engine: Engine) -> list[Tensor]:
    """Return the results of a step, an evaluation, and a step with two packs under way at once."""

    def loss_of(pack: int) -> Tensor:
        return predict(transformer, PACKS[pack], CONVENTIONS, engine)[0].square().mean()

    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    loss = loss_of(0)
    torch.autograd.backward(loss)
    seen = [loss.detach()]
    for parameter in trained:
        assert parameter.grad is not None
        seen.append(parameter.grad)
        with torch.no_grad():
            parameter.add_(parameter.grad, alpha=-0.01)
        parameter.grad = None
    with torch.no_grad():
        seen.append(loss_of(1))
    seen[-1].item()  # the host waits, as after a logged step
    torch.autograd.backward(loss_of(0) + loss_of(1))
    return seen + [parameter.grad for parameter in trained if parameter.grad is not None]


@cache
def plain() -> list[Tensor]:
    return train(build(), EVERYTHING_RESIDENT)


def emulated(gpu: EmulatedGpu, plan: Plan = LEAN) -> list[Tensor]:
    transformer = build()
    with gpu.emulate():
        return train(transformer, open_engine(transformer, plan, CPU, gpu.allocate))


def num_wrong(gpu: EmulatedGpu, plan: Plan = LEAN) -> int:
    """Return how many results on the emulated GPU differ from the plain run's by any bit."""
    found = emulated(gpu, plan)
    assert len(gpu.streams) > 1 and gpu.device_memory.num_reused > 0
    return sum(not torch.equal(one, other) for one, other in zip(found, plain(), strict=True))


HOST, WEIGHTS, OFFLOAD = host_memory, weight_streaming, activation_offload
AFTER_COMPUTE = "        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))\n"
ON_STREAM = "        with self.beside_compute():\n            yield\n"
COMPUTE_WAITS = "torch.cuda.current_stream(self._stream.device).wait_event(event)"
COMPUTE_WAITS_FOR_ALL = "        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)\n"
RECORD = "None if self._stream is None else self._stream.record_event()"
BRING = "        self._fetch(index)\n"
BROUGHT = "        self._copies.compute_waits(copied)\n"
EARLY_WAIT = "        self._copies.compute_waits(self._copies.record())\n"
EARLY_RECORD = "        early = self._copies.record()\n"
COPY_IN = "        with self._copies.after_compute():  # the evicted block's computation is done by then\n"
COPIED_IN = "(buffer, self._copies.record())"
COPY_OUT = "        with out.after_compute():\n"
COPIED_OUT = "        self._copied = out.record()\n"
RELEASE = "        self._offload.out.compute_waits(self._copied)\n"
SETTLE = "        self._offload.release(all_but=0)\n"
FETCH = "        self._fetch()\n"
TAKE = "        self._offload.back.compute_waits(self._copied)\n"
COPY_BACK = (
    "        with back.after_compute():  # which has waited for the copies out, and may just have freed this memory\n"
)
COPIED_BACK = "        self._copied = back.record()\n"


def on(stream: str) -> str:
    """Return the line that issues copies on a stream without its wait."""
    return f"        with torch.cuda.stream({stream}._stream):\n"


MUTANTS = [
    Mutant(HOST, "after_compute does not wait", [(AFTER_COMPUTE, "")]),
    Mutant(HOST, "after_compute waits last", [(AFTER_COMPUTE, ""), (ON_STREAM, ON_STREAM + AFTER_COMPUTE)]),
    Mutant(HOST, "after_compute lets the compute wait", [(AFTER_COMPUTE, COMPUTE_WAITS_FOR_ALL)]),
    Mutant(HOST, "compute_waits does not wait", [(COMPUTE_WAITS, "pass")]),
    Mutant(HOST, "compute_waits lets the copies wait", [(COMPUTE_WAITS, "self._stream.wait_event(event)")]),
    Mutant(HOST, "record marks the compute stream", [(RECORD, "torch.cuda.current_stream(None).record_event()")]),
    Mutant(HOST, "record marks nothing", [(RECORD, "None")]),
    Mutant(WEIGHTS, "bring does not wait", [(BROUGHT, "")]),
    Mutant(WEIGHTS, "bring waits first", [(BROUGHT, ""), (BRING, EARLY_WAIT + BRING)]),
    Mutant(WEIGHTS, "bring does not mark the block as used", [("        self._resident.move_to_end(index)\n", "")]),
    Mutant(WEIGHTS, "bring leaves the weights on the host", [("        self._point(index, buffer)\n", "")]),
    Mutant(WEIGHTS, "fetch does not wait", [(COPY_IN, on("self._copies"))]),
    Mutant(WEIGHTS, "fetch records first", [(COPY_IN, EARLY_RECORD + COPY_IN), (COPIED_IN, "(buffer, early)")]),
    Mutant(WEIGHTS, "fetch does not record", [(COPIED_IN, "(buffer, None)")]),
    Mutant(WEIGHTS, "fetch evicts the block used last", [("popitem(last=False)", "popitem(last=True)")]),
    Mutant(WEIGHTS, "fetch gives one buffer to all", [("self._free.pop()", "self._free[0]")]),
    Mutant(OFFLOAD, "send does not wait", [(COPY_OUT, on("out"))]),
    Mutant(OFFLOAD, "send records first", [(COPIED_OUT, ""), (COPY_OUT, COPIED_OUT + COPY_OUT)]),
    Mutant(OFFLOAD, "send does not record", [(COPIED_OUT, "")]),
    Mutant(OFFLOAD, "send does not hold the tensor", [("Tensor(host, order, tensor)", "Tensor(host, order, None)")]),
    Mutant(OFFLOAD, "release does not wait", [(RELEASE, "")]),
    Mutant(OFFLOAD, "take_back releases nothing", [(SETTLE, "")]),
    Mutant(OFFLOAD, "take_back releases after its fetch", [(SETTLE + FETCH, FETCH + SETTLE)]),
    Mutant(OFFLOAD, "take_back does not wait", [(TAKE, "")]),
    # "take_back waits before its fetch" changes nothing: a block keeps three tensors or more, all are taken back before
    # the recomputation begins, and the second call waits for the fetch of the first
    Mutant(OFFLOAD, "fetch does not wait", [(COPY_BACK, on("back"))]),
    Mutant(OFFLOAD, "fetch records first", [(COPIED_BACK, ""), (COPY_BACK, COPIED_BACK + COPY_BACK)]),
    Mutant(OFFLOAD, "fetch does not record", [(COPIED_BACK, "")]),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_streaming_and_offload_give_the_plain_bits(schedule: str) -> None:
    assert num_wrong(EmulatedGpu(SCHEDULES[schedule])) == 0


def test_the_emulated_device_shows_a_removed_wait(tmp_path: Path) -> None:
    (mutant,) = (one for one in MUTANTS if one.name == "compute_waits does not wait")
    with mutant.installed(tmp_path):
        assert num_wrong(EmulatedGpu(min)) > 0


def test_every_mutant_applies_to_the_code() -> None:
    assert all(mutant.text != inspect.getsource(mutant.module) for mutant in MUTANTS)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "name", [name for name, plan in PLANS.items() if plan.stream_weights or plan.offload_activations]
)
def test_every_plan_gives_the_plain_bits(name: str, seed: int) -> None:
    schedules: list[Choose] = list(SCHEDULES.values()) if seed == 0 else [random.Random(seed).choice]
    for choose in schedules:
        assert num_wrong(EmulatedGpu(choose, random.Random(seed) if seed else None), PLANS[name]) == 0


@pytest.mark.faults
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_every_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    def is_wrong(choose: Choose) -> bool:
        try:
            return num_wrong(EmulatedGpu(choose)) > 0
        except (AssertionError, KeyError):  # a block that is not resident, or whose weights are on the host
            return True

    with mutant.installed(tmp_path):
        assert any(map(is_wrong, SCHEDULES.values()))


def test_blocks_below_the_only_adapter_keep_nothing() -> None:
    transformer = build_transformer("5b", num_layers=3)
    add_lora(transformer, 2, layers_to_transform=[2], layers_pattern="transformer_blocks")
    live: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts: list[tuple[int, int]] = []

    def allocate(num_bytes: int, device: torch.device) -> Tensor:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        live.add(buffer)
        return buffer

    engine = open_engine(transformer, LEAN, CPU, allocate)
    assert engine.offload is not None
    for step in range(20):
        run(transformer, lambda: predict(transformer, PACKS[0], CONVENTIONS, engine))
        counts.append((len(live), engine.offload.num_blocks - step))
    assert set(counts) == {(3, 1)}, "three blocks' weights; activations of one block in each step"
