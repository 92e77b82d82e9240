"""What a block keeps for its backward pass: everything, its input, or attention's output too.

Everything but attention is token by token, so `_Recomputed` works in chunks of tokens and recomputes them in the
backward pass: with `block_input` it keeps the block's input, with `attention_output` the attention's output and
logsumexp too, so that attention never runs twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.attention import AttentionState, attention_backward, attention_forward
from train.block import Pack, after_attention, known_qkv, normalise_and_turn, per_head, raw_qkv, run_block_plainly
from train.engine import Engine
from train.modulation import Rows

Chunk = tuple[int, int, Pack]
"""Start, stop and the tokens between."""


def run_block(block: CogVideoXBlock, hidden: Tensor, pack: Pack, rows: Rows, engine: Engine, index: int) -> Tensor:
    """[S,D] -> [S,D] by the `index`-th block, keeping for the backward pass what `engine.activations` says."""
    if engine.fused is not None:
        pack = pack.compiled(engine.fused, hidden.device)
    if engine.activations == "full":
        return run_block_plainly(block, hidden, pack, rows, engine.attention)
    if not torch.is_grad_enabled():
        return _run_in_chunks(block, hidden, pack, rows, engine, index, _chunks(pack, engine.chunk_tokens))[0]
    result: Tensor = _Recomputed.apply(hidden, *rows, block, pack, engine, index, *trainable_parameters(block))  # type: ignore[no-untyped-call]
    return result


class _Recomputed(torch.autograd.Function):
    """A block by hand: gradients for its input, its modulation rows where they are trained, and its adapters."""

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
        chunks = _chunks(pack, engine.chunk_tokens)
        result, attended, states, randomness = _run_in_chunks(block, hidden, pack, rows, engine, index, chunks)
        kept = [hidden]
        if engine.activations == "attention_output":
            kept += [attended, *(state.logsumexp for state in states)]
            ctx.states = [replace(state, logsumexp=hidden.new_empty(0)) for state in states]
        if engine.offload is None:
            ctx.save_for_backward(*kept)
        else:
            ctx.offloaded = engine.offload.send(kept)
        ctx.rows, ctx.randomness = rows, randomness
        ctx.arguments = block, pack, engine, index, chunks
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        block, pack, engine, index, chunks = ctx.arguments
        before, after = ctx.randomness
        hidden, *rest = ctx.saved_tensors if engine.offload is None else engine.offload.take_back(ctx.offloaded)
        totals = _Totals(ctx, block, hidden)
        projected: _Projected | None = None
        with engine.block_weights(index, index - 1):
            if rest:
                attended, *sums = rest
                states = [replace(state, logsumexp=lse) for state, lse in zip(ctx.states, sums, strict=True)]
            else:
                with before.again():
                    projected = _Projected(block, hidden, ctx.rows[0], chunks, keep_raw=True)
                attended, states = attention_forward(*projected.for_attention(), pack.clip_lengths, engine.attention)
            with after.again():
                attended_gradient = totals.pull_after_attention(gradients[0], hidden, attended, chunks)
            if projected is None:
                with before.again():
                    projected = _Projected(block, hidden, ctx.rows[0], chunks, keep_raw=True)
            qkv_gradients = attention_backward(
                attended_gradient, *projected.for_attention(), attended, states, pack.clip_lengths
            )
            del rest, attended, attended_gradient
            projected.drop_for_attention()
            with before.again():
                totals.pull_qkv(qkv_gradients, hidden, projected, chunks)
        return totals.hidden, *totals.rows, None, None, None, None, *totals.trainable


def _run_in_chunks(
    block: CogVideoXBlock, hidden: Tensor, pack: Pack, rows: Rows, engine: Engine, index: int, chunks: list[Chunk]
) -> tuple[Tensor, Tensor, list[AttentionState], tuple["_Randomness", "_Randomness"]]:
    """The block outside autograd: its result, attention's output and state, the generator before and after it."""
    result = torch.empty_like(hidden)
    before = _Randomness(block, hidden.device)
    with engine.block_weights(index, index + 1):
        attended, states = attention_forward(
            *_Projected(block, hidden, rows[0], chunks).for_attention(), pack.clip_lengths, engine.attention
        )
        after = _Randomness(block, hidden.device)
        for start, stop, part in chunks:
            result[start:stop] = after_attention(block, hidden[start:stop], attended[start:stop], part, rows)
    return result, attended, states, (before, after)


class _Projected:
    """Query, key and value of a whole pack, made chunk by chunk outside autograd."""

    def __init__(
        self, block: CogVideoXBlock, hidden: Tensor, rows: Tensor, chunks: list[Chunk], *, keep_raw: bool = False
    ) -> None:
        query, key, value = (torch.empty_like(hidden) for _ in range(3))
        self.raw_query, self.raw_key = (torch.empty_like(hidden if keep_raw else hidden[:0]) for _ in range(2))
        with torch.no_grad():
            for start, stop, part in chunks:
                raw_query, raw_key, value[start:stop] = raw_qkv(block, hidden[start:stop], part, rows)
                turned = normalise_and_turn(block, raw_query, raw_key, part)
                query[start:stop], key[start:stop] = (heads.flatten(1) for heads in turned)
                if keep_raw:
                    self.raw_query[start:stop], self.raw_key[start:stop] = raw_query, raw_key
        self._for_attention = [per_head(block, tokens) for tokens in (query, key, value)]

    def for_attention(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [S,heads,head_dim], normalised and turned."""
        query, key, value = self._for_attention
        return query, key, value

    def drop_for_attention(self) -> None:
        """Their memory is free; the raw query and key stay."""
        self._for_attention = []


class _Totals:
    """Sums over the chunks of what autograd gives for each."""

    def __init__(self, ctx: Any, block: CogVideoXBlock, hidden: Tensor) -> None:
        wants_hidden, *wants_rows = ctx.needs_input_grad[:3]
        self._block, self._parameters = block, trainable_parameters(block)
        first, second = (
            rows.detach().requires_grad_(wanted) for rows, wanted in zip(ctx.rows, wants_rows, strict=True)
        )
        self._rows: Rows = (first, second)
        self.hidden = torch.empty_like(hidden) if wants_hidden else None
        self.rows: list[Tensor | None] = [None, None]
        self.trainable: list[Tensor | None] = [None] * len(self._parameters)

    def pull_after_attention(self, gradient: Tensor, hidden: Tensor, attended: Tensor, chunks: list[Chunk]) -> Tensor:
        """The gradient [S,D] for attention's output."""
        attended_gradient = torch.empty_like(attended)
        for start, stop, part in chunks:
            tokens, heads = self._leaf(hidden[start:stop]), attended[start:stop].detach().requires_grad_()
            with torch.enable_grad():
                result = after_attention(self._block, tokens, heads, part, self._rows, backward=True)
            tokens_gradient, heads_gradient = self._pull([result], [gradient[start:stop]], [tokens, heads])
            assert heads_gradient is not None
            attended_gradient[start:stop] = heads_gradient
            if self.hidden is not None and tokens_gradient is not None:
                self.hidden[start:stop] = tokens_gradient
        return attended_gradient

    def pull_qkv(self, gradients: Sequence[Tensor], hidden: Tensor, projected: _Projected, chunks: list[Chunk]) -> None:
        for start, stop, part in chunks:
            tokens = self._leaf(hidden[start:stop])
            raw_query, raw_key = projected.raw_query[start:stop], projected.raw_key[start:stop]
            with torch.enable_grad():
                raw_query, raw_key, value = known_qkv(self._block, tokens, part, self._rows[0], raw_query, raw_key)
                query, key = normalise_and_turn(self._block, raw_query, raw_key, part)
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

    def __init__(self, block: CogVideoXBlock, device: torch.device) -> None:
        drops = any(isinstance(module, nn.Dropout) and module.training and module.p for module in block.modules())
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


def trainable_parameters(block: CogVideoXBlock) -> list[nn.Parameter]:
    """Of a block, without those that make its modulation rows."""
    modulation = {id(value) for norm in (block.norm1, block.norm2) for value in norm.linear.parameters()}
    return [value for value in block.parameters() if value.requires_grad and id(value) not in modulation]


def _chunks(pack: Pack, size: int) -> list[Chunk]:
    """Stretches of at most `size` tokens, as equal as can be."""
    num_tokens = sum(pack.part_lengths)
    count = -(-num_tokens // size)
    ends = [num_tokens * index // count for index in range(count + 1)]
    return [(start, stop, pack.cut(start, stop)) for start, stop in pairwise(ends)]
