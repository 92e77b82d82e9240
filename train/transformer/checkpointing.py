"""What a block keeps for its backward pass: its input, attention's output too, or all that a matrix product made.

Everything but attention is token by token, so a block works in chunks of tokens. The backward pass recomputes what was
not kept: with `block_input` everything, with `attention_output` everything but attention, with `full` only norms,
modulation, rotary positions and the activation function. The levels keep 1, 2 and 10 tensors [S,D].
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.transformer.attention import AttentionState, attention_backward, attention_forward
from train.transformer.block import (
    Pack,
    add_attention,
    add_feed_forward,
    known_qkv,
    normalize_and_turn,
    per_head,
    raw_qkv,
    widen,
)
from train.transformer.engine import Activations, Engine
from train.transformer.modulation import Rows

Chunk = tuple[int, int, Pack]
"""Start, stop and the tokens between."""

RAW = ("raw_query", "raw_key", "value")
KEPT: Mapping[Activations, tuple[str, ...]] = {
    "block_input": (),
    "attention_output": ("attended",),
    "full": ("attended", *RAW, "middle", "wide"),
}
"""What a level keeps beside the block's input: [S,D] each, `wide` [S,4D]; with `attended` its log-sum-exps."""


def run_block(block: CogVideoXBlock, hidden: Tensor, pack: Pack, rows: Rows, engine: Engine, index: int) -> Tensor:
    """[S,D] -> [S,D] by the `index`-th block, keeping for the backward pass what `engine.activations` says."""
    if engine.fused is not None:
        pack = pack.compiled(engine.fused, hidden.device)
    if not torch.is_grad_enabled():
        return _run_forward(block, hidden, pack, rows, engine, index, keep=())[0]
    result: Tensor = _ByHand.apply(hidden, *rows, block, pack, engine, index, *trainable_parameters(block))  # type: ignore[no-untyped-call]
    return result


class _ByHand(torch.autograd.Function):
    """A block's gradients for its input, its modulation rows where they are trained, and its adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        attention_rows: Tensor,
        feed_forward_rows: Tensor,
        block: CogVideoXBlock,
        pack: Pack,
        engine: Engine,
        index: int,
        *trainable: nn.Parameter,
    ) -> Tensor:
        rows = (attention_rows, feed_forward_rows)
        keep = KEPT[engine.activations]
        result, kept, states, ctx.randomness = _run_forward(block, hidden, pack, rows, engine, index, keep=keep)
        states = states if "attended" in kept else []
        saved = [hidden, *kept.values(), *(state.logsumexp for state in states)]
        if engine.offload is None:
            ctx.save_for_backward(*saved)
        else:
            ctx.offloaded = engine.offload.send(saved)
        ctx.names, ctx.rows = list(kept), rows
        ctx.states = [replace(state, logsumexp=hidden.new_empty(0)) for state in states]
        ctx.arguments, ctx.trainable = (block, pack, engine, index), trainable
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        block, pack, engine, index = ctx.arguments
        chunks = _chunks(pack, engine.chunk_tokens)
        before, after = ctx.randomness
        hidden, *rest = ctx.saved_tensors if engine.offload is None else engine.offload.take_back(ctx.offloaded)
        kept = dict(zip(ctx.names, rest, strict=False))
        states = [replace(state, logsumexp=lse) for state, lse in zip(ctx.states, rest[len(kept) :], strict=True)]
        raw, turned = [kept.pop(name) for name in RAW if name in kept], None
        totals = _Totals(ctx, block, hidden)
        with engine.block_weights(index, index - 1):
            if "attended" not in kept:
                with before.again():
                    raw = _project(block, hidden, ctx.rows[0], chunks)
                turned = _turn(block, raw, chunks)
                kept["attended"], states = attention_forward(
                    *turned, per_head(block, raw[2]), pack.clip_lengths, engine.attention
                )
            with after.again():
                attended_gradient = totals.pull_after_attention(gradients[0], hidden, kept, chunks)
            if not raw:
                with before.again():
                    raw = _project(block, hidden, ctx.rows[0], chunks)
            turned = turned or _turn(block, raw, chunks)
            qkv_gradients = attention_backward(
                attended_gradient, *turned, per_head(block, raw.pop()), kept["attended"], states, pack.clip_lengths
            )
            del rest, kept, attended_gradient, turned
            with before.again():
                totals.pull_qkv(qkv_gradients, hidden, raw, chunks)
        return totals.hidden, *totals.rows, None, None, None, None, *totals.trainable


def _run_forward(
    block: CogVideoXBlock, hidden: Tensor, pack: Pack, rows: Rows, engine: Engine, index: int, *, keep: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor], list[AttentionState], tuple["_Randomness", "_Randomness"]]:
    """The block outside autograd: its result, what is kept, attention's state, the generator before and after it."""
    chunks = _chunks(pack, engine.chunk_tokens)
    kept: dict[str, Tensor] = {}
    result = torch.empty_like(hidden)
    drops = _drops(block)
    before = _Randomness(drops, hidden.device)
    with engine.block_weights(index, index + 1):
        raw = _project(block, hidden, rows[0], chunks)
        query, key = _turn(block, raw, chunks, in_place="raw_query" not in keep)
        attended, states = attention_forward(query, key, per_head(block, raw[2]), pack.clip_lengths, engine.attention)
        kept |= {name: value for name, value in zip(RAW, raw, strict=True) if name in keep}
        if "attended" in keep:
            kept["attended"] = attended
        del raw, query, key
        after = _Randomness(drops, hidden.device)
        for start, stop, part in chunks:
            middle = add_attention(block, hidden[start:stop], attended[start:stop], part, rows[0])
            wide = widen(block, middle, part, rows[1])
            result[start:stop] = add_feed_forward(block, middle, wide, part, rows[1])
            for name, tokens in (("middle", middle), ("wide", wide)):
                if name in keep:
                    kept.setdefault(name, tokens.new_empty(len(hidden), tokens.shape[1]))[start:stop] = tokens
    return result, kept, states, (before, after)


@torch.no_grad()
def _project(block: CogVideoXBlock, hidden: Tensor, rows: Tensor, chunks: list[Chunk]) -> list[Tensor]:
    """Query, key and value [S,D] of a whole pack, as the linear layers give them."""
    whole = [torch.empty_like(hidden) for _ in range(3)]
    for start, stop, part in chunks:
        for tokens, made in zip(whole, raw_qkv(block, hidden[start:stop], part, rows), strict=True):
            tokens[start:stop] = made
    return whole


@torch.no_grad()
def _turn(
    block: CogVideoXBlock, raw: Sequence[Tensor], chunks: list[Chunk], *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Query and key [S,heads,head_dim], normalized and turned; in the memory of `raw` if that is not needed again."""
    raw_query, raw_key, _ = raw
    query, key = (raw_query, raw_key) if in_place else (torch.empty_like(raw_query), torch.empty_like(raw_key))
    for start, stop, part in chunks:
        turned = normalize_and_turn(block, raw_query[start:stop], raw_key[start:stop], part)
        query[start:stop], key[start:stop] = (heads.flatten(1) for heads in turned)
    return per_head(block, query), per_head(block, key)


class _Totals:
    """Sums over the chunks of what autograd gives for each."""

    def __init__(self, ctx: Any, block: CogVideoXBlock, hidden: Tensor) -> None:
        wants_hidden, *wants_rows = ctx.needs_input_grad[:3]
        self._block, self._parameters = block, ctx.trainable
        first, second = (
            rows.detach().requires_grad_(wanted) for rows, wanted in zip(ctx.rows, wants_rows, strict=True)
        )
        self._rows: Rows = (first, second)
        self.hidden = torch.empty_like(hidden) if wants_hidden else None
        self.rows: list[Tensor | None] = [None, None]
        self.trainable: list[Tensor | None] = [None] * len(self._parameters)

    def pull_after_attention(
        self, gradient: Tensor, hidden: Tensor, kept: Mapping[str, Tensor], chunks: list[Chunk]
    ) -> Tensor:
        """The gradient [S,D] for attention's output."""
        block, (attention_rows, feed_forward_rows) = self._block, self._rows
        attended = kept["attended"]
        attended_gradient = torch.empty_like(attended)
        for start, stop, part in chunks:
            tokens, heads = self._leaf(hidden[start:stop]), attended[start:stop].detach().requires_grad_()
            known = {name: kept[name][start:stop] for name in ("middle", "wide") if name in kept}
            with torch.enable_grad():
                middle = add_attention(block, tokens, heads, part, attention_rows, known.get("middle"))
                wide = widen(block, middle, part, feed_forward_rows, known.get("wide"))
                result = add_feed_forward(block, middle, wide, part, feed_forward_rows, backward=True)
            tokens_gradient, heads_gradient = self._pull([result], [gradient[start:stop]], [tokens, heads])
            assert heads_gradient is not None
            attended_gradient[start:stop] = heads_gradient
            if self.hidden is not None and tokens_gradient is not None:
                self.hidden[start:stop] = tokens_gradient
        return attended_gradient

    def pull_qkv(self, gradients: Sequence[Tensor], hidden: Tensor, raw: Sequence[Tensor], chunks: list[Chunk]) -> None:
        """Adds to the sums what the gradients [S,heads,head_dim] for query, key and value give."""
        for start, stop, part in chunks:
            tokens = self._leaf(hidden[start:stop])
            raw_query, raw_key = (values[start:stop] for values in raw)
            with torch.enable_grad():
                raw_query, raw_key, value = known_qkv(self._block, tokens, part, self._rows[0], raw_query, raw_key)
                query, key = normalize_and_turn(self._block, raw_query, raw_key, part)
                value = per_head(self._block, value)
            parts = [gradient[start:stop] for gradient in gradients]
            (tokens_gradient,) = self._pull([query, key, value], parts, [tokens])
            if self.hidden is not None and tokens_gradient is not None:
                self.hidden[start:stop] += tokens_gradient

    def _leaf(self, tokens: Tensor) -> Tensor:
        return tokens.detach().requires_grad_(self.hidden is not None)

    def _pull(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients for `inputs`; those for rows and parameters are added to the sums."""
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        leaves = [*inputs, *self._rows, *self._parameters]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if not pairs or not wanted:
            return [None] * len(inputs)
        found = torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
        by_leaf = dict(zip(map(id, wanted), found, strict=True))
        for leaves_of, sums in ((self._rows, self.rows), (self._parameters, self.trainable)):
            for position, leaf in enumerate(leaves_of):
                gradient = by_leaf.get(id(leaf))
                if gradient is not None:
                    total = sums[position]
                    sums[position] = gradient if total is None else total + gradient
        return [by_leaf.get(id(leaf)) for leaf in inputs]


class _Randomness:
    """The generator's state before a stretch of the forward pass, so that its repetition drops the same values."""

    def __init__(self, drops: bool, device: torch.device) -> None:
        self._devices = [device] if drops and device.type == "cuda" else []
        self._state = torch.get_rng_state() if drops else None
        self._device_states = [torch.cuda.get_rng_state(device) for device in self._devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        if self._state is None:
            yield
            return
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._state)
            for device, state in zip(self._devices, self._device_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _drops(block: CogVideoXBlock) -> bool:
    """Whether anything in the block draws."""
    return block.training and any(
        isinstance(module, nn.Dropout) and module.training and module.p for module in block.modules()
    )


def trainable_parameters(block: CogVideoXBlock) -> list[nn.Parameter]:
    """Of a block, without those that make its modulation rows."""
    layers = (block.norm1.norm, block.attn1, block.norm2.norm, block.ff)
    return [value for layer in layers for value in layer.parameters() if value.requires_grad]


def _chunks(pack: Pack, size: int) -> list[Chunk]:
    """Stretches of at most `size` tokens, as equal as can be."""
    num_tokens = sum(pack.part_lengths)
    count = -(-num_tokens // size)
    ends = [num_tokens * index // count for index in range(count + 1)]
    return [(start, stop, pack.cut(start, stop)) for start, stop in pairwise(ends)]
