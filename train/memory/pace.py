"""Seconds of a training step on a card that is not there: exact FLOPs and bytes over published rates, to some 15 %.

Nothing here is measured. It predicts the published 0.875 s of a compiled 5B forward pass on an H100 as 0.80 s, and the
published 40 s of a checkpointed 1.5-5B step at 81x768x1360 on an A800 as 43 s.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from train.transformer.checkpointing import KEPT_UNITS
from train.transformer.engine import Activations, Plan


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's published rates: bf16 FLOP/s and bytes/s that programs reach, below what the data sheet promises."""

    name: str
    gib: float
    linear: float
    """Matrix products with thousands of rows; what stas00/ml-engineering measured (MAMF), less a sixth for shapes."""
    attention: Mapping[str, tuple[float, float]]
    """Kernel -> forward, backward, with heads of 64 and 16k tokens; the first is what "auto" comes to. The H100's are
    from the figures of the FlashAttention-3 paper (arXiv 2407.08608), backward continued from 2k tokens."""
    memory: float
    """Element-wise kernels, three quarters of the data sheet's bandwidth."""
    host: float
    """Pinned memory over PCIe, each way."""


CARDS: Mapping[str, Card] = {
    "h100": Card(
        "H100 SXM 80 GB",
        79.6,
        665e12,
        {"cudnn": (413e12, 400e12), "flash3": (497e12, 470e12), "flash": (324e12, 290e12)},
        2.5e12,
        50e9,
    ),
    "a100": Card("A100 SXM 80 GB", 80.0, 230e12, {"flash": (150e12, 125e12)}, 1.5e12, 25e9),
    "4090": Card("RTX 4090 24 GB", 24.0, 150e12, {"flash": (145e12, 125e12)}, 0.76e12, 25e9),
}
"""By what `precog plan --card` takes. Rates of the 4090, and of attention on the A100, are the least certain."""

EAGER_TENSORS, FUSED_TENSORS = 93, 24
"""[S,D] tensors in bf16 that a block's element-wise kernels read and write on the way forward, eager and compiled;
counted on the meta device."""
STORED_BYTES = {"model": 2.0, "int8": 1.0, "fp8": 1.0}
"""Of a block's weight, in bf16 or quantized."""
WIDENED_BYTES = {"model": 0.0, "int8": 7.0, "fp8": 7.0}
"""Read and written to widen a weight once: read small, written wide, and for a scale per row read and written again."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the FLOPs of a block, and how many there are."""

    width: int
    num_layers: int
    clip_tokens: tuple[int, ...]
    """Of each clip in the pack, text and video."""
    adapter_weights: int
    """Of one block."""

    @property
    def tokens(self) -> int:
        return sum(self.clip_tokens)

    @property
    def linear_flops(self) -> float:
        """24 d^2 S: query, key, value 6, output 2, feed-forward 8 and 8."""
        return 24.0 * self.width**2 * self.tokens

    @property
    def attention_flops(self) -> float:
        """4 S^2 d for each clip."""
        return 4.0 * self.width * sum(tokens**2 for tokens in self.clip_tokens)

    @property
    def adapter_flops(self) -> float:
        return 2.0 * self.adapter_weights * self.tokens


@dataclass(frozen=True, slots=True)
class Work:
    """What one pass through one block has to do; FLOPs and bytes."""

    linear: float
    attention_forward: float
    attention_backward: float
    memory: float

    def seconds(self, card: Card, kernel: str) -> float:
        forward, backward = card.attention[kernel]
        attention = self.attention_forward / forward + self.attention_backward / backward
        return self.linear / card.linear + attention + self.memory / card.memory


def block_work(shape: Shape, plan: Plan) -> tuple[Work, Work]:
    """The forward pass of a block and its backward pass, with what that recomputes.

    A frozen base needs no weight gradients, so a linear layer's backward pass costs what its forward pass costs; that
    of FlashAttention costs 2.5 times as much. The last feed-forward layer is never recomputed.
    """
    again = {"block_input": 16 / 24, "attention_output": 16 / 24, "full": 0.0}[plan.activations]
    attention_again = 1 if plan.activations == "block_input" else 0
    tensors = FUSED_TENSORS if plan.compile else EAGER_TENSORS
    row_wise = 2.0 * tensors * shape.tokens * shape.width
    widening = 12.0 * shape.width**2 * WIDENED_BYTES[plan.base_precision]
    forward = Work(shape.linear_flops + shape.adapter_flops, shape.attention_flops, 0.0, row_wise + widening)
    backward = Work(
        (1 + again) * shape.linear_flops + (2 + bool(again)) * shape.adapter_flops,
        attention_again * shape.attention_flops,
        2.5 * shape.attention_flops,
        3 * row_wise + (1 + again) * widening,  # once more in every level, and twice for the gradients
    )
    return forward, backward


def kept_bytes(shape: Shape, activations: Activations) -> float:
    """What a block keeps for its backward pass, in bf16."""
    return 2.0 * KEPT_UNITS[activations] * shape.tokens * shape.width


def pack_seconds(card: Card, plan: Plan, shape: Shape) -> float | None:
    """Forward and backward pass over one pack; None without published rates for the kernel of attention.

    Copies run beside the computation: a block takes as long as the longer of the two.
    """
    kernel = next(iter(card.attention)) if plan.attention == "auto" else plan.attention
    if kernel not in card.attention:
        return None
    weights = 12.0 * shape.width**2 * STORED_BYTES[plan.base_precision] if plan.stream_weights else 0.0
    activations = kept_bytes(shape, plan.activations) if plan.offload_activations else 0.0
    forward, backward = (work.seconds(card, kernel) for work in block_work(shape, plan))
    # weights come in on both ways; activations go out on the way forward and come in on the way back
    forward = max(forward, weights / card.host, activations / card.host)
    backward = max(backward, (weights + activations) / card.host)
    return shape.num_layers * (forward + backward)
