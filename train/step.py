"""One optimizer step's gradients: forward and backward of this rank's packs, then one sum over the ranks."""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, distributed

from shared import seeding
from shared.config import Train
from shared.errors import NonFiniteError
from shared.model.conventions import Conventions
from train.data.example import Example, ModelInput
from train.distributed import all_gather
from train.objective import clip_loss, loss_scale
from train.transformer.attention import Backend, pinned
from train.transformer.engine import Engine
from train.transformer.forward import predict, predict_reference

Packs = Sequence[Sequence[Example]]

logger = logging.getLogger(__name__)

SMALLER = 2.0**-4
"""Factor of the loss scale when a gradient overflows."""
REDUCE_BYTES = 64 * 2**20
"""Gradients that are summed over the ranks at once."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of the global batch, the same on every rank."""

    loss: float
    """Mean over clips of each clip's mean."""
    grad_norm: float
    """Before clipping."""
    stopping: bool
    """Some rank has received a signal."""


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
    """Leave the global batch's gradient in the adapter, on every rank; return this rank's losses and the step's result.

    A transformer in fp16 takes its backward pass with a scaled loss. On overflow the pass is repeated with a smaller
    scale. Every step starts with the same scale, so a resumed run needs no state for it (unlike a `GradScaler`).
    """
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    scale = loss_scale(transformer.dtype, train.global_batch_size)
    while True:
        losses = accumulate_gradients(transformer, packs, conventions, train, engine, scale)
        result = finish_gradients(parameters, losses, accelerator, train, scale, stopping=stopping)
        if scale <= 1 or not math.isfinite(result.loss) or math.isfinite(result.grad_norm):
            return losses, result
        scale *= SMALLER
        logger.warning("a gradient is beyond fp16; the step is repeated with the loss scaled by %g", scale)
        for parameter in parameters:
            parameter.grad = None


def accumulate_gradients(
    transformer: CogVideoXTransformer3DModel,
    packs: Packs,
    conventions: Conventions,
    train: Train,
    engine: Engine,
    scale: float = 1.0,
) -> list[Tensor]:
    """Add `scale` times this rank's share of the global mean's gradient to the adapter; return the loss of each clip.

    The adapter's dropout is drawn per pack, so it depends on the packing and with it on the number of processes.
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
    """Return the velocities by diffusers' forward under autocast, as the reference script runs it."""
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
    """Sum gradients over the ranks, divide them by `scale`, and clip them to `max_grad_norm`."""
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
        sum_over_ranks(gradients)
        distributed.all_reduce(sums)
    if scale != 1:
        for gradient in gradients:
            gradient.div_(scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
    loss, asked = sums.tolist()
    return StepResult(loss / train.global_batch_size, float(norm), asked > 0)


def sum_over_ranks(gradients: Sequence[Tensor]) -> None:
    """Sum each tensor over the ranks, in place, a few at a time: the copy of all of them would cost memory."""
    start, num_bytes = 0, 0
    for stop, gradient in enumerate(gradients, 1):
        num_bytes += gradient.nbytes
        if num_bytes >= REDUCE_BYTES or stop == len(gradients):
            some = gradients[start:stop]
            flat = torch.cat([value.flatten() for value in some])
            distributed.all_reduce(flat)
            for value, part in zip(some, torch.split(flat, [value.numel() for value in some]), strict=True):
                value.copy_(part.view_as(value))
            start, num_bytes = stop, 0


def require_finite(result: StepResult, packs: Packs, losses: Sequence[Tensor]) -> None:
    """Raise `NonFiniteError` on every rank, before the update, naming the clips."""
    if all(map(torch.isfinite, torch.tensor([result.loss, result.grad_norm]))):
        return
    mine = [example.name for pack in packs for example in pack]
    bad = [name for name, loss in zip(mine, losses, strict=True) if not torch.isfinite(loss)]
    everyone, all_bad = ([name for names in all_gather(part) for name in names] for part in (mine, bad))
    where = f"loss of {', '.join(all_bad)}" if all_bad else f"gradient of {', '.join(everyone)}"
    raise NonFiniteError(
        f"not finite: {where} (loss {result.loss}, gradient norm {result.grad_norm}); this step was not applied"
    )
