"""What a plan costs on the card, by running the real code on torch's meta device, and the choice of a plan.

A prediction counts what torch allocates: frozen weights, fp32 adapter, its gradients and Adam moments, activations. It
leaves out the CUDA context and what the allocator reserves beyond.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn

from shared import console
from shared.config import Config, Train
from shared.errors import UsageError, require_extra
from shared.model.conventions import Conventions, refusal
from shared.model.geometry import Bucket, latent_shape, padding_frames, video_tokens
from train.data.example import ModelInput
from train.distributed import all_gather
from train.memory.tally import Tally
from train.objective import clip_loss
from train.transformer.engine import Plan, open_engine
from train.transformer.forward import predict
from train.transformer.load import add_adapter
from train.transformer.modulation import is_frozen
from train.transformer.positions import forget_tables

META = torch.device("meta")
GIB = 2**30
RESERVED_PER_ALLOCATED = 1.15
"""What the CUDA allocator reserves for a byte allocated, from published runs beside simulated ones (1.13 to 1.15)."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes on the device, of one process that trains on one pack."""

    peak: int
    """The most that is allocated at once."""
    loaded: int
    """Before the first step: weights, adapter, gradients, Adam moments."""
    kept: int
    """More than that between forward and backward pass: saved activations, mostly."""
    preview: int = 0
    """The most that is allocated at once while a preview is made, without gradients; 0 if none is."""

    @property
    def needed(self) -> int:
        """The most of the whole run."""
        return max(self.peak, self.preview)


def predict_peak(
    transformer_config: Mapping[str, Any],
    conventions: Conventions,
    train: Train,
    plan: Plan,
    pack: Sequence[Bucket],
    dtype: torch.dtype,
    preview: Bucket | None = None,
) -> Prediction:
    """The memory of training on `pack` with a transformer in `dtype`, Adam in fp32 and a CUDA attention kernel.

    Between the steps, previews of the size `preview` are made. Two shallow models are run and continued to the real
    depth, which is exact because every block costs the same.
    """
    depth = int(transformer_config["num_layers"])
    shallow = max(plan.stream_weights, 2)

    def run(num_layers: int) -> Prediction:
        shape = {**transformer_config, "num_layers": num_layers}
        return _run_on_meta(shape, conventions, train, plan, pack, dtype, preview)

    if depth <= shallow + 1:
        return run(depth)
    low, high = run(shallow), run(shallow + 1)
    sizes = zip(astuple(low), astuple(high), strict=True)
    return Prediction(*(a + (b - a) * (depth - shallow) for a, b in sizes))


def _run_on_meta(
    transformer_config: Mapping[str, Any],
    conventions: Conventions,
    train: Train,
    plan: Plan,
    pack: Sequence[Bucket],
    dtype: torch.dtype,
    preview: Bucket | None = None,
) -> Prediction:
    clips = [_clip_on_meta(bucket, conventions, dtype) for bucket in pack]
    targets = [torch.empty(clip.latents.shape, device=META)[:, : conventions.out_channels] for clip in clips]
    forget_tables()  # they count
    tally = Tally()
    with tally:
        with META:
            transformer = CogVideoXTransformer3DModel.from_config(dict(transformer_config))
            nn.Module.to(transformer.requires_grad_(False), dtype)
            add_adapter(transformer, train)
        transformer.train()
        engine = open_engine(transformer, plan, META)
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        moments = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        loaded = tally.peak_bytes = tally.num_bytes
        predictions = predict(transformer, clips, conventions, engine)
        loss = torch.stack([clip_loss(*pair) for pair in zip(predictions, targets, strict=True)]).sum()
        del predictions
        kept = tally.num_bytes - loaded
        torch.autograd.backward(loss)
        peak = tally.peak_bytes
        if preview is not None:
            del loss
            transformer.zero_grad(set_to_none=True)
            tally.peak_bytes = tally.num_bytes
            with torch.no_grad():
                predict(transformer.eval(), [_clip_on_meta(preview, conventions, dtype)], conventions, engine)
    del moments
    return Prediction(peak, loaded, kept, 0 if preview is None else tally.peak_bytes)


def _clip_on_meta(bucket: Bucket, conventions: Conventions, dtype: torch.dtype) -> ModelInput:
    _, frames, height, width = latent_shape(bucket)
    frames += padding_frames(frames, conventions.patch_size_t)
    return ModelInput(
        torch.empty(frames, conventions.in_channels, height, width, dtype=dtype, device=META),
        torch.empty(conventions.text_length, conventions.text_embed_dim, dtype=dtype, device=META),
        torch.empty((), dtype=torch.int64, device=META),
    )


PREFERENCE = (
    Plan("full"),
    Plan("attention_output"),
    Plan("attention_output", modulation_table=True),
    Plan("attention_output", offload_activations=True, modulation_table=True),
    Plan("attention_output", offload_activations=True, stream_weights=2, modulation_table=True),
)
"""From the fastest to the leanest. A CPU has no host to offload to."""
PREFERENCE_ON_CPU = (Plan("full"), Plan("attention_output"), Plan("block_input"))


def choose_plan(
    config: Config,
    transformer: CogVideoXTransformer3DModel,
    conventions: Conventions,
    buckets: Sequence[Bucket],
    device: torch.device,
) -> Plan:
    """The first plan of the preference that the user's fields allow and that fits; says what and why.

    Raises `UsageError` if the fields contradict each other or need what is not installed.
    """
    if config.memory.base_precision == "nf4":
        require_extra("bitsandbytes", "memory.base_precision = 'nf4'", "bitsandbytes")
    plans = candidates(config, device, table_possible=is_frozen(transformer))
    if len(plans) == 1:
        return plans[0]
    pack, preview = largest_pack(config.train, conventions, buckets), preview_bucket(config, conventions)
    free = min(all_gather(free_bytes(device)))  # so that all processes choose alike
    too_large: list[str] = []
    for plan in plans:
        found = predict_peak(transformer.config, conventions, config.train, plan, pack, transformer.dtype, preview)
        needed = int(found.needed * RESERVED_PER_ALLOCATED)
        if needed <= free:
            break
        too_large.append(f"{describe(plan)} would take {needed / GIB:.2f} GiB")
    what = describe_pack(pack) if found.peak >= found.preview else f"a preview of {preview}"
    why = f"predicted {needed / GIB:.2f} GiB for {what}, {free / GIB:.2f} GiB free on {device}"
    if needed > free:
        too_large.pop()
        why += "; this may not fit, and is the leanest that [memory] leaves"
    if too_large:
        why += f"; {too_large[-1]}"
    console.say(f"memory: {describe(plan)} ({why})")
    return plan


def candidates(config: Config, device: torch.device, *, table_possible: bool) -> list[Plan]:
    """The plans that the fields of [memory] leave open, in order of preference.

    Raises `UsageError` if they leave none.
    """
    memory, train = config.memory, config.train
    fixed = {name: value for name, value in memory.model_dump().items() if value != "auto" and name in Plan.__slots__}
    if train.gradient_checkpointing and fixed.setdefault("activations", "block_input") != "block_input":
        raise UsageError(
            "train.gradient_checkpointing = true means memory.activations = 'block_input', "
            f"but that is {memory.activations!r}"
        )
    if fixed.get("modulation_table") and not table_possible:
        raise UsageError("memory.modulation_table = true: not with adapters on the layers that make the modulation")
    if memory.base_precision != "model" and train.use_dora:
        base = memory.base_precision
        raise UsageError(f"memory.base_precision = {base!r}: not with train.use_dora, which needs the weights' norms")
    fixed.setdefault("compile", device.type == "cuda" and importlib.util.find_spec("triton") is not None)
    moving = any(fixed.get(name) for name in ("offload_activations", "stream_weights"))
    if train.transformer_engine == "reference":
        if moving or fixed.get("modulation_table") or fixed.get("activations", "full") != "full":
            raise UsageError("[memory] acts on train.transformer_engine = 'packed'; with 'reference' leave it out")
        if memory.compile is True:
            raise UsageError("memory.compile = true acts on train.transformer_engine = 'packed'; leave it out")
        return [Plan(base_precision=fixed["base_precision"], attention=memory.attention)]
    preference = PREFERENCE_ON_CPU if device.type == "cpu" else PREFERENCE
    plans: list[Plan] = []
    for plan in preference:
        plan = replace(plan, **fixed)
        if not table_possible:
            plan = replace(plan, modulation_table=False)
        if plan not in plans:
            plans.append(plan)
    assert plans, fixed
    return plans


def largest_pack(train: Train, conventions: Conventions, buckets: Sequence[Bucket]) -> list[Bucket]:
    """As many clips of the largest bucket as one pack may hold."""

    def tokens(bucket: Bucket) -> int:
        return conventions.text_length + video_tokens(bucket, conventions.patch_size, conventions.patch_size_t)

    bucket = max(buckets, key=tokens)
    return [bucket] * max(1, min(train.max_tokens_per_pack // tokens(bucket), train.global_batch_size))


def preview_bucket(config: Config, conventions: Conventions) -> Bucket | None:
    """The size of the run's previews, if it makes any that may be larger than what it trains on."""
    if not config.train.preview_steps or conventions.image_to_video:  # which has its previews in the clips' sizes
        return None
    bucket = Bucket(config.sample.num_frames, config.sample.height, config.sample.width)
    return None if refusal(conventions, bucket) else bucket  # `train.preview` will refuse it, too


def describe_pack(pack: Sequence[Bucket]) -> str:
    """One bucket, and how often."""
    return f"{len(pack)} x {pack[0]}" if len(pack) > 1 else str(pack[0])


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses: of the card, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):  # what the kernel would free of its caches is in it
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe(plan: Plan) -> str:
    """In words."""
    words = [f"activations {plan.activations}" + (" in host memory" if plan.offload_activations else "")]
    if plan.stream_weights:
        words.append(f"{plan.stream_weights} blocks' weights on the card at a time")
    if plan.modulation_table:
        words.append("modulation by timestep")
    if plan.base_precision != "model":
        words.append(f"{plan.base_precision} base")
    if plan.compile:
        words.append("compiled")
    return ", ".join(words)
