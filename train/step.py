"""One optimizer step: read the clips, run forward and backward of this rank's packs, and sum the gradients."""

import logging
import math
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, distributed

from shared import seeding
from shared.config import Train
from shared.errors import NonFiniteError
from shared.model.conventions import Conventions
from train.data.example import Example
from train.data.order import Draw, Packs, divide, global_batch
from train.distributed import all_gather
from train.objective import clip_loss, loss_scale
from train.run import Run
from train.transformer.engine import Engine
from train.transformer.forward import predict

Examples = Sequence[Sequence[Example]]
"""The packs of this rank."""

logger = logging.getLogger(__name__)

SMALLER = 2.0**-4
"""Factor of the loss scale when a gradient overflows."""
READING_THREADS = 4
"""Examples that are drawn at once; a keyed draw is a pure function, so their number changes no value."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The packs of this rank, and numbers of the global batch."""

    packs: Examples
    """On this rank's device."""
    tokens: int
    num_packs: int
    clips: list[str]
    """Keys of the latents, in order."""
    timesteps: list[int]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of the global batch, the same on every rank."""

    loss: float
    """Mean over clips of each clip's mean."""
    grad_norm: float
    """Before clipping."""
    stopping: bool
    """Some rank has received a signal."""


def plan_batch(run: Run, step: int) -> tuple[tuple[Draw, ...], list[int], tuple[Packs, ...]]:
    """Return draws, tokens per clip and each rank's packs of optimizer step `step` (from 0); nothing is read."""
    train, dataset = run.config.train, run.dataset
    draws = global_batch(run.view.hash, train.seed, dataset.places, train.global_batch_size, step, run.windows)
    tokens = [dataset.tokens(draw.row) for draw in draws]
    return draws, tokens, divide(tokens, run.width, run.accelerator.num_processes, train.max_tokens_per_pack)


def read_batch(run: Run, step: int) -> Batch:
    """Read this rank's packs of optimizer step `step` (from 0) and copy them to its device."""
    dataset, device = run.dataset, run.accelerator.device
    draws, tokens, ranks = plan_batch(run, step)
    timesteps = dataset.timesteps(draws, step)
    with ThreadPoolExecutor(READING_THREADS) as readers:
        packs = [
            [
                example.to(device, run.transformer.dtype)
                for example in readers.map(lambda index: dataset.example(draws[index], timesteps[index]), pack)
            ]
            for pack in ranks[run.accelerator.process_index]
        ]
    clips = [dataset.rows[draw.row].latent_key for draw in draws]
    return Batch(packs, sum(tokens), sum(map(len, ranks)), clips, timesteps)


def prefetch_batches(run: Run, first_step: int) -> Generator[Batch, None, None]:
    """Yield the batches from `first_step` to the end of the run; the next one is read while one is in use."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = [reader.submit(read_batch, run, first_step)] if first_step < run.num_steps else []
        for step in range(first_step + 1, run.num_steps + 1):
            batch = upcoming.pop().result()
            if step < run.num_steps:
                upcoming.append(reader.submit(read_batch, run, step))
            yield batch


def take_gradients(run: Run, packs: Examples, *, stopping: bool) -> StepResult:
    """Leave the gradient of the global batch in the adapter, on every rank.

    A transformer in fp16 takes its backward pass with a scaled loss. On overflow the pass is repeated with a smaller
    scale. Every step starts with the same scale, so a resumed run needs no state for it (unlike a `GradScaler`).
    Raises `NonFiniteError` on every rank, naming the clips.
    """
    transformer, train = run.transformer, run.config.train
    parameters = [parameter for _, parameter in run.parameters]
    scale = loss_scale(transformer.dtype, train.global_batch_size)
    while True:
        losses = accumulate_gradients(transformer, packs, run.conventions, train, run.engine, scale)
        result = finish_gradients(parameters, losses, run.accelerator, train, scale, stopping=stopping)
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return result
        if scale <= 1 or not math.isfinite(result.loss):
            raise _not_finite(result, packs, losses)
        scale *= SMALLER
        logger.warning("a gradient is beyond fp16; the step is repeated with the loss scaled by %g", scale)
        for parameter in parameters:
            parameter.grad = None


def accumulate_gradients(
    transformer: CogVideoXTransformer3DModel,
    packs: Examples,
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
        predictions = predict(transformer, [example.model_input for example in pack], conventions, engine)
        pairs = zip(predictions, pack, strict=True)
        pack_losses = torch.stack(
            [example.weight * clip_loss(prediction, example.target) for prediction, example in pairs]
        )
        torch.autograd.backward(pack_losses.sum() / (train.global_batch_size / scale))
        losses += pack_losses.detach().unbind()
    return losses


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
    zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    total = torch.stack([zero, *(loss.double() for loss in losses)]).sum()
    sums = torch.stack([total, total.new_tensor(float(stopping))])
    if accelerator.num_processes > 1:
        for tensor in (*gradients, sums):
            distributed.all_reduce(tensor)
    if scale != 1:
        for gradient in gradients:
            gradient.div_(scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
    loss, asked = sums.tolist()
    return StepResult(loss / train.global_batch_size, float(norm), asked > 0)


def _not_finite(result: StepResult, packs: Examples, losses: Sequence[Tensor]) -> NonFiniteError:
    """Return the error, the same on every rank: a collective."""
    names = [example.name for pack in packs for example in pack]
    bad = [name for name, loss in zip(names, losses, strict=True) if not torch.isfinite(loss)]
    everyone, all_bad = ([name for part in all_gather(found) for name in part] for found in (names, bad))
    where = f"loss of {', '.join(all_bad)}" if all_bad else f"gradient of {', '.join(everyone)}"
    return NonFiniteError(
        f"not finite: {where} (loss {result.loss}, gradient norm {result.grad_norm}); this step was not applied"
    )
