"""Activation checkpointing of a block: what its forward pass keeps, and what its backward pass recomputes.

Every level is `torch.utils.checkpoint`. `block_input` keeps the block's input and recomputes all. `attention_output`
also keeps attention's output and log-sum-exp, so that attention never runs twice. `full` also keeps the results of the
matrix products, so that only element-wise work is recomputed.
"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from train.transformer.activation_offload import OffloadedBlock, OffloadedTensor
from train.transformer.block import Pack, add_gated, block_forward, block_modulation
from train.transformer.engine import Engine

aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
PRODUCTS = {aten.mm.default, aten.addmm.default}


def run_block(block: CogVideoXBlock, hidden: Tensor, pack: Pack, engine: Engine, index: int) -> Tensor:
    """Return the output [S,D] of the block at `index`, keeping for the backward pass what `engine` says.

    The last linear layer ends the checkpointed region, and its gate is outside. Autograd needs that layer's weight and
    nothing else, so the recomputation stops before its product, and the weight is on the device when it is read.

    A frozen modulation is computed once, outside. It has a few rows for each clip, but its layers are as large as the
    others: on short packs, reading them again costs as much as a product over all tokens.
    """
    recomputes = chain([False], repeat(True))

    def region(hidden: Tensor, *frozen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if next(recomputes) and engine.weights is not None:
            engine.weights.bring(index, index - 1)
        modulations = (frozen[0], frozen[1]) if frozen else block_modulation(block, pack)
        return *block_forward(block, hidden, modulations, pack, engine.attend), modulations[1]

    if engine.weights is not None:
        engine.weights.bring(index, index + 1)
    trained_modulation = pack.temb.requires_grad or any(
        value.requires_grad for norm in (block.norm1, block.norm2) for value in norm.linear.parameters()
    )
    frozen = () if trained_modulation else block_modulation(block, pack)
    trains = torch.is_grad_enabled() and (
        hidden.requires_grad or trained_modulation or any(value.requires_grad for value in block.parameters())
    )
    if not trains:
        with torch.no_grad():
            return add_gated(*region(hidden, *frozen), pack)
    level = engine.level(index)
    offloaded = None if engine.offload is None else engine.offload.open_block()

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if level == "block_input":
            return nullcontext(), nullcontext()
        kept: deque[Any] = deque()
        width = hidden.shape[1] if level == "full" else None
        return _Keep(kept, width, offloaded), _Reuse(kept, width, offloaded)

    with nullcontext() if offloaded is None else saved_tensors_hooks(offloaded.send, offloaded.take_back):
        results: tuple[Tensor, Tensor, Tensor] = checkpoint(
            region,
            hidden,
            *frozen,
            use_reentrant=False,
            context_fn=contexts,
            preserve_rng_state=_drops(block),
            determinism_check="none",
        )
    return add_gated(*results, pack)


class _Selective(TorchDispatchMode):
    """Selects the operations whose results are kept: attention, and with `width` products that sum over it.

    Those are the layers that read [S,D]. The products of LoRA's second factor sum over its rank and are cheap; the last
    layer of the block sums over 4D, and nothing reads its result in a backward pass.
    """

    def __init__(self, kept: deque[Any], width: int | None, offloaded: OffloadedBlock | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept, self.width, self.offloaded = kept, width, offloaded

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run compiled inside, as in torch's own selective checkpointing."""
        return True

    def selects(self, func: Any, args: Any) -> bool:
        """Return whether the result of this operation is kept."""
        return func in ATTENTION or (func in PRODUCTS and args[-2].shape[1] == self.width)


class _Keep(_Selective):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.selects(func, args):
            values = result if isinstance(result, tuple) else (result,)
            self.kept.append([self._put(value.detach()) if isinstance(value, Tensor) else value for value in values])
        return result

    def _put(self, value: Tensor) -> Tensor | OffloadedTensor:
        leaves = self.offloaded is not None and value.is_floating_point()  # not a kernel's random state
        return self.offloaded.send(value) if self.offloaded is not None and leaves else value


class _Reuse(_Selective):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.selects(func, args):
            return func(*args, **(kwargs or {}))
        values = [self._take(value) for value in self.kept.popleft()]
        return tuple(values) if func in ATTENTION else values[0]

    def _take(self, value: Any) -> Any:
        return self.offloaded.take_back(value) if isinstance(value, OffloadedTensor) and self.offloaded else value


def _drops(block: CogVideoXBlock) -> bool:
    """Return whether any adapter of the block draws dropout."""
    return block.training and any(
        isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in block.modules()
    )
