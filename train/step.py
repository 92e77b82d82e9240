"""One optimizer step's gradients: forward and backward of this rank's packs, then one sum over the ranks."""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from shared import seeding
from shared.config import Train
from shared.errors import NonFiniteError
from shared.model.conventions import Conventions
from train.data.example import Example, ModelInput
from train.distributed import all_gather
from train.objective import clip_loss
from train.transformer.attention import Backend, pinned
from train.transformer.engine import Engine
from train.transformer.forward import predict, predict_reference

Packs = Sequence[Sequence[Example]]

logger = logging.getLogger(__name__)

FP16_LOSS_SCALE = 2.0**16
"""Of one clip's mean loss. Its gradient for one of a million predicted values is else below fp16's smallest normal."""
SMALLER = 2.0**-4
"""By which the scale falls when a gradient overflows."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of the global batch, the same on every rank."""

    loss: float
    """Mean over clips of each clip's mean."""
    grad_norm: float
    """Before clipping."""
    stopping: bool
    """Some rank was asked to stop."""


def step_gradients(
    transformer: CogVideoXTransformer3DModel,
    packs: Packs,
    conventions: Conventions,
    train: Train,
    engine: Engine,
    accelerator: Accelerator,
    *,
    stopping: bool,
) -> tuple[list[Tensor], StepResult]:
    """The global batch's gradient in the adapter, the same on every rank; this rank's losses and the step's result.

    A transformer in fp16 takes its backward pass with a scaled loss. On overflow the pass is repeated with a smaller
    scale, from the same start in every step, so that a resumed run has nothing to remember (unlike a `GradScaler`).
    """
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    scale = loss_scale(transformer.dtype, train.global_batch_size)
    while True:
        losses = accumulate_gradients(transformer, packs, conventions, train, engine, scale)
        result = finish_gradients(parameters, losses, accelerator, train, scale, stopping=stopping)
        if scale <= 1 or not math.isfinite(result.loss) or math.isfinite(result.grad_norm):
            return losses, result
        scale *= SMALLER
        logger.warning("a gradient is beyond fp16; once more with the loss scaled by %g", scale)
        for parameter in parameters:
            parameter.grad = None


def loss_scale(dtype: torch.dtype, clips: int) -> float:
    """Of a mean over `clips`: a power of two, which rounds nothing; 1 but for fp16."""
    return FP16_LOSS_SCALE * 2.0 ** math.ceil(math.log2(clips)) if dtype == torch.float16 else 1.0


def accumulate_gradients(
    transformer: CogVideoXTransformer3DModel,
    packs: Packs,
    conventions: Conventions,
    train: Train,
    engine: Engine,
    scale: float = 1.0,
) -> list[Tensor]:
    """Add `scale` times this rank's share of the global mean's gradient to the adapter; the loss of each clip.

    The adapter's dropout, if any, is drawn per pack, so it follows the packing and with it the number of processes.
    """
    losses: list[Tensor] = []
    for pack in packs:
        torch.manual_seed(seeding.integer_seed("dropout", train.seed, *(example.draw for example in pack)))
        inputs = [example.model_input for example in pack]
        if train.transformer_engine == "reference":
            predictions = _predict_reference(transformer, inputs, conventions, engine.attention)
        else:
            predictions = predict(transformer, inputs, conventions, engine)
        pairs = zip(predictions, pack, strict=True)
        pack_losses = torch.stack(
            [example.weight * clip_loss(prediction, example.target) for prediction, example in pairs]
        )
        torch.autograd.backward(pack_losses.sum() / (train.global_batch_size / scale))
        losses += pack_losses.detach().unbind()
    return losses


def _predict_reference(
    transformer: CogVideoXTransformer3DModel, inputs: Sequence[ModelInput], conventions: Conventions, attention: Backend
) -> list[Tensor]:
    """diffusers' forward under autocast, as the reference script runs it."""
    narrow = transformer.dtype in (torch.float16, torch.bfloat16)
    with pinned(attention), torch.autocast(transformer.device.type, transformer.dtype) if narrow else nullcontext():
        return predict_reference(transformer, inputs, conventions)


def finish_gradients(
    parameters: Sequence[torch.nn.Parameter],
    losses: Sequence[Tensor],
    accelerator: Accelerator,
    train: Train,
    scale: float = 1.0,
    *,
    stopping: bool,
) -> StepResult:
    """Sum gradients over the ranks, once, divide them by `scale`, and bring them down to `max_grad_norm`."""
    for parameter in parameters:
        if parameter.grad is None:  # this rank had no clip
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    device = accelerator.device
    total = torch.stack(
        [torch.zeros((), dtype=torch.float64, device=device), *(loss.double() for loss in losses)]
    ).sum()
    sums = torch.stack([total, total.new_tensor(float(stopping))])
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="sum")
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        sums = accelerator.reduce(sums, reduction="sum")
    if scale != 1:
        for gradient in gradients:
            gradient.div_(scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
    loss, asked = sums.tolist()
    return StepResult(loss / train.global_batch_size, float(norm), asked > 0)


def require_finite(result: StepResult, packs: Packs, losses: Sequence[Tensor]) -> None:
    """Raises `NonFiniteError` on every rank, before the update, naming the clips."""
    if all(map(torch.isfinite, torch.tensor([result.loss, result.grad_norm]))):
        return
    mine = [example.name for pack in packs for example in pack]
    bad = [name for name, loss in zip(mine, losses, strict=True) if not torch.isfinite(loss)]
    everyone, all_bad = ([name for names in all_gather(part) for name in names] for part in (mine, bad))
    where = f"loss of {', '.join(all_bad)}" if all_bad else f"gradient of {', '.join(everyone)}"
    raise NonFiniteError(
        f"not finite: {where} (loss {result.loss}, gradient norm {result.grad_norm}); this step was not applied"
    )
