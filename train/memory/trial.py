"""The trial of memory plans on the device itself: one step of the largest pack, the next leaner plan on failure."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import CogVideoXTransformer3DModel

from shared import console
from shared.device import peak_memory_bytes
from shared.errors import UsageError
from shared.model.conventions import Conventions
from shared.model.geometry import Bucket
from train.distributed import all_gather
from train.memory.choice import GIB, describe, describe_pack
from train.memory.simulation import blank_clip
from train.transformer.engine import Engine, Plan, open_engine
from train.transformer.forward import predict


@dataclass(frozen=True, slots=True)
class Trial:
    """The plan that a step of the largest pack was taken with."""

    plan: Plan
    pack: str
    peak_memory_bytes: int
    """Most memory of this process in that step."""


def open_tried(
    transformer: CogVideoXTransformer3DModel,
    plans: Sequence[Plan],
    conventions: Conventions,
    pack: Sequence[Bucket],
    device: torch.device,
) -> tuple[Engine, Trial]:
    """Open the first of `plans` with which a step of `pack` does not run out of memory; the same on every process.

    Raises `UsageError` if the last one does.
    """
    engine: Engine | None
    for plan in plans:
        engine = None
        try:
            engine = open_engine(transformer, plan, device)
            peak = step_peak(transformer, engine, conventions, pack, device)
        except torch.OutOfMemoryError:
            peak = None
        peaks = all_gather(peak)
        if engine is not None and peak is not None and None not in peaks:
            console.say(f"memory: {describe(plan)}, measured {peak / GIB:.2f} GiB for {describe_pack(pack)}")
            return engine, Trial(plan, describe_pack(pack), peak)
        engine = None  # frees its buffers
        transformer.zero_grad(set_to_none=True)
        for value in (*transformer.parameters(), *transformer.buffers()):
            value.data = value.data.cpu()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        console.say(f"memory: {describe(plan)} runs out of memory with {describe_pack(pack)}")
    raise UsageError(
        f"[memory]: {describe(plans[-1])} runs out of memory with {describe_pack(pack)} on {device}; "
        'leave fields at "auto", lower train.lora_rank or train.max_tokens_per_pack, or use smaller buckets'
    )


def step_peak(
    transformer: CogVideoXTransformer3DModel,
    engine: Engine,
    conventions: Conventions,
    pack: Sequence[Bucket],
    device: torch.device,
) -> int:
    """Take a step of blank clips with gradients and Adam's moments; return the peak. The model stays as it is."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trained = [value for value in transformer.parameters() if value.requires_grad]
    moments = [torch.zeros_like(value) for value in trained for _ in range(2)]
    clips = [blank_clip(bucket, conventions, transformer.dtype, device) for bucket in pack]
    predictions = predict(transformer, clips, conventions, engine)
    loss = torch.stack([prediction.float().square().mean() for prediction in predictions]).sum()
    torch.autograd.backward(loss)
    peak = peak_memory_bytes(device)
    del moments
    transformer.zero_grad(set_to_none=True)
    return peak
