"""What each plan would cost on a GPU, from configs alone: stage 2's half of `precog plan`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from shared import console
from shared.cache.storage import open_storage
from shared.cache.view import read_view
from shared.config import Config, Train
from shared.device import DTYPES
from shared.errors import CacheError, UsageError
from shared.model.conventions import Conventions, read_conventions, refusal
from shared.model.geometry import Bucket, video_tokens
from shared.model.pretrained import pretrained_config, pretrained_dtype
from train.memory.choice import (
    GIB,
    RESERVED_PER_ALLOCATED,
    candidates,
    describe,
    describe_pack,
    largest_pack,
    preview_bucket,
)
from train.memory.pace import CARDS, Card, Shape, pack_seconds
from train.memory.simulation import META, Prediction, predict_peak
from train.transformer.engine import Plan
from train.transformer.load import add_adapter

CUDA = torch.device("cuda")
CONTEXT_GIB = 0.75
"""What CUDA itself takes of a card."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one plan; `seconds` of an optimizer step, where the card's rates are known, which they are not in fp32."""

    plan: Plan
    memory: Prediction
    fits: bool
    seconds: float | None

    @property
    def reserved_gib(self) -> float:
        """With what the allocator takes beyond."""
        return self.memory.needed * RESERVED_PER_ALLOCATED / GIB

    def as_json(self) -> dict[str, Any]:
        sizes = {name: getattr(self.memory, name) / GIB for name in ("peak", "loaded", "kept", "preview")}
        words = {"plan": describe(self.plan), "fits": self.fits, "seconds_per_step": self.seconds}
        return {**words, "simulated_gib": sizes | {"reserved": self.reserved_gib}}


@dataclass(frozen=True, slots=True)
class Outlook:
    """On one card, from the fastest plan to the leanest."""

    card: Card | float
    """A float is a card of which only the GiB are known."""
    work: str
    """What is trained, in words."""
    costs: list[Costs]

    @property
    def taken(self) -> Costs | None:
        """What memory = "auto" would take."""
        return next((costs for costs in self.costs if costs.fits), None)

    @property
    def card_name(self) -> str:
        return f"{self.card:g} GiB" if isinstance(self.card, float) else self.card.name

    def as_json(self) -> dict[str, Any]:
        taken = None if self.taken is None else describe(self.taken.plan)
        plans = [costs.as_json() for costs in self.costs]
        return {"card": self.card_name, "pack": self.work, "plans": plans, "takes": taken}


def find_card(text: str) -> Card | float:
    """A card by its name, or by its GiB. Raises `UsageError`."""
    if text.lower() in CARDS:
        return CARDS[text.lower()]
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 2**20:
        raise UsageError(f"--card {text!r}: one of {', '.join(CARDS)}, or its memory in GiB, such as 16")
    return gib


def foresee(config: Config, card: Card | float) -> Outlook:
    """Every plan that [memory] leaves open, for the largest pack of the view, or of the buckets if there is none yet.

    Raises `UsageError` if [memory] contradicts itself, or no bucket can be trained.
    """
    transformer_config = pretrained_config(config.model, "transformer")
    conventions = read_conventions(
        transformer_config,
        pretrained_config(config.model, "vae"),
        pretrained_config(config.model, "scheduler"),
        drop_learned_positions=config.model.drop_learned_positions,
    )
    if config.train.transformer_engine == "reference":
        raise UsageError("train.transformer_engine = 'reference' has no plans; --card is about 'packed'")
    buckets, source = _buckets(config, conventions)
    asked = config.train.mixed_precision
    precision = pretrained_dtype(config.model, "transformer") if asked == "auto" else asked
    block = _one_block(transformer_config, config.train)
    pack, preview = largest_pack(config.train, conventions, buckets), preview_bucket(config, conventions)
    shape = shape_of(transformer_config, conventions, pack, block)
    num_packs = -(-config.train.global_batch_size // len(pack))
    gib = (card if isinstance(card, float) else card.gib) - CONTEXT_GIB
    costs = []
    for plan in candidates(config, CUDA):
        plan = replace(plan, compile=config.memory.compile is not False)  # the card's machine has a compiler
        found = predict_peak(transformer_config, conventions, config.train, plan, pack, DTYPES[precision], preview)
        seconds = None if isinstance(card, float) or precision == "fp32" else pack_seconds(card, plan, shape)
        fits = found.needed * RESERVED_PER_ALLOCATED <= gib * GIB
        costs.append(Costs(plan, found, fits, None if seconds is None else seconds * num_packs))
    clips = f"{num_packs} x {describe_pack(pack)}" if num_packs > 1 else describe_pack(pack)
    return Outlook(card, f"{clips} a step ({source}, {precision}, rank {config.train.lora_rank})", costs)


def show(outlook: Outlook) -> None:
    """One line per plan, and the choice."""
    rows = []
    for costs in outlook.costs:
        words = [f"{costs.memory.needed / GIB:.2f} GiB allocated", f"about {costs.reserved_gib:.2f} GiB reserved"]
        words.append("fits" if costs.fits else "does not fit")
        if costs.seconds is not None:
            # below that, starting kernels takes longer than running them
            words.append(f"about {costs.seconds:.2g} s a step" if costs.seconds >= 0.1 else "under 0.1 s a step")
        rows.append((describe(costs.plan), ", ".join(words)))
    console.table(f"Training on {outlook.card_name}: {outlook.work}", rows)
    console.say("memory is simulated; seconds are estimates from published rates (+-15 %); nothing of it is measured")
    taken = outlook.taken
    console.say(f"memory = auto would take: {describe(taken.plan)}" if taken else _advice(outlook))


def _advice(outlook: Outlook) -> str:
    return f"no plan fits in {outlook.card_name}; try memory.base_precision, a lower rank or shorter clips"


def shape_of(
    transformer_config: Mapping[str, Any],
    conventions: Conventions,
    pack: Sequence[Bucket],
    block: CogVideoXTransformer3DModel,
) -> Shape:
    """Of the transformer on `pack`; `block` is one with a single block and its adapter."""
    tokens = [
        conventions.text_length + video_tokens(bucket, conventions.patch_size, conventions.patch_size_t)
        for bucket in pack
    ]
    adapter = sum(value.numel() for value in block.transformer_blocks.parameters() if value.requires_grad)
    width = int(transformer_config["num_attention_heads"]) * int(transformer_config["attention_head_dim"])
    return Shape(width, int(transformer_config["num_layers"]), tuple(tokens), adapter)


def _one_block(transformer_config: Mapping[str, Any], train: Train) -> CogVideoXTransformer3DModel:
    with META:
        block = CogVideoXTransformer3DModel.from_config({**transformer_config, "num_layers": 1}).requires_grad_(False)
        add_adapter(block, train)
    return block


def _buckets(config: Config, conventions: Conventions) -> tuple[Sequence[Bucket], str]:
    """Of the view if stage 1 has made it, else of the config; and which."""
    try:
        storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
        view = read_view(storage, config.data.name)
    except CacheError:
        frames = [count for count in config.data.frame_buckets if count <= config.data.max_num_frames]
        wanted = [Bucket(count, *size) for count, size in product(frames, config.data.resolutions)]
        fitting = [bucket for bucket in wanted if not refusal(conventions, bucket)]
        if not fitting:
            raise UsageError(f"data: {refusal(conventions, wanted[0]) if wanted else 'no bucket'}") from None
        return fitting, "largest bucket of the config"
    buckets = [row.bucket for row in view.split("train")]
    for bucket in sorted(set(buckets)):
        if reason := refusal(conventions, bucket):
            raise UsageError(f"view {view.name}: {reason}")
    return buckets, f"largest clip of view {view.name}"
