"""Whether a base in fewer bits teaches the adapter the same: the cosine of its gradient with the exact base's."""

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from shared import console
from shared.errors import UsageError
from shared.model.conventions import Conventions
from train.data.example import Example
from train.objective import clip_loss
from train.step import loss_scale
from train.transformer.engine import Engine, Plan, open_engine
from train.transformer.forward import predict

LEAST_COSINE = 0.99


def open_quantized_engine(
    transformer: CogVideoXTransformer3DModel,
    plan: Plan,
    device: torch.device,
    conventions: Conventions,
    example: Example,
    *,
    allow_low_cosine: bool,
) -> Engine:
    """`open_engine` for a quantized base, which says how far the adapter's gradient on one clip turned.

    Raises `UsageError` below a cosine of 0.99, unless that is allowed.
    """
    # the exact base need not fit on the card: its blocks pass through
    passing = Plan("attention_output", stream_weights=0 if device.type == "cpu" else 2)
    exact = adapter_gradient(transformer, open_engine(transformer, passing, device), conventions, example)
    engine = open_engine(transformer, plan, device)
    cosine = float(torch.cosine_similarity(exact, adapter_gradient(transformer, engine, conventions, example), dim=0))
    console.say(f"memory: {plan.base_precision} base, cosine of the adapter's gradient with the exact one {cosine:.5f}")
    if not cosine >= LEAST_COSINE and not allow_low_cosine:
        raise UsageError(
            f"memory.base_precision = {plan.base_precision!r}: the adapter's gradient has cosine {cosine:.5f} with the "
            f"unquantized base's, below {LEAST_COSINE}; use 'model', or memory.allow_low_cosine = true to train anyway"
        )
    return engine


def adapter_gradient(
    transformer: CogVideoXTransformer3DModel, engine: Engine, conventions: Conventions, example: Example
) -> Tensor:
    """[weights of the adapter] fp32, for one clip without dropout, in fp16 scaled; the model is left as it was."""
    was_training = transformer.training
    transformer.eval()
    example = example.to(transformer.device, transformer.dtype)
    trained = [value for value in transformer.parameters() if value.requires_grad]
    (prediction,) = predict(transformer, [example.model_input], conventions, engine)
    loss = clip_loss(prediction, example.target) * loss_scale(transformer.dtype, clips=1)
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    transformer.train(was_training)
    return torch.cat([gradient.flatten().float() for gradient in gradients if gradient is not None])
