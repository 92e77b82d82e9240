"""Fidelity of a quantized base: the cosine of the adapter's gradient with that on the exact base."""

from dataclasses import replace

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from shared import console
from shared.errors import UsageError
from shared.model.conventions import Conventions
from train.data.example import Example
from train.objective import clip_loss, loss_scale
from train.transformer.engine import Engine, Plan, open_engine
from train.transformer.forward import predict

LEAST_COSINE = 0.99


def quantize_base(
    transformer: CogVideoXTransformer3DModel,
    plan: Plan,
    device: torch.device,
    conventions: Conventions,
    example: Example,
) -> None:
    """Quantize the base as `plan` says, and print the cosine of the adapter's gradient on one clip with the exact one.

    Both gradients are taken with the leanest plan, because the exact base need not fit on the card. Raises `UsageError`
    below a cosine of 0.99.
    """
    gradients = []
    for precision in ("model", plan.base_precision):
        leanest = Plan("attention_output", offload_activations=True, stream_weights=2, attention=plan.attention)
        engine = open_engine(transformer, replace(leanest, base_precision=precision), device)
        gradients.append(adapter_gradient(transformer, engine, conventions, example))
        assert engine.weights is not None
        engine.weights.evict_all()
    cosine = float(torch.cosine_similarity(gradients[0], gradients[1], dim=0))
    console.say(f"memory: {plan.base_precision} base, cosine of the adapter's gradient with the exact one {cosine:.5f}")
    if not cosine >= LEAST_COSINE:
        raise UsageError(
            f"memory.base_precision = {plan.base_precision!r}: the adapter's gradient has cosine {cosine:.5f} with the "
            f"unquantized base's, below {LEAST_COSINE}; use 'model', and memory.stream_weights = 2 to save memory"
        )


def adapter_gradient(
    transformer: CogVideoXTransformer3DModel, engine: Engine, conventions: Conventions, example: Example
) -> Tensor:
    """Return the adapter's gradient, fp32 in one dimension, for one clip without dropout; the model stays as it was."""
    was_training = transformer.training
    transformer.eval()
    example = example.to(transformer.device, transformer.dtype)
    trained = [value for value in transformer.parameters() if value.requires_grad]
    (prediction,) = predict(transformer, [example.model_input], conventions, engine)
    loss = clip_loss(prediction, example.target) * loss_scale(transformer.dtype, clips=1)
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    transformer.train(was_training)
    return torch.cat([gradient.flatten().float() for gradient in gradients if gradient is not None])
