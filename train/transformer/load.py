"""Loading: the frozen transformer of the checkpoint, and a new adapter in fp32. Nothing else is loaded."""

from collections.abc import Mapping

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from shared import seeding
from shared.config import Config, Train
from shared.device import DTYPES
from shared.errors import UsageError
from shared.model.pretrained import pretrained_part


def load_transformer(config: Config) -> CogVideoXTransformer3DModel:
    """Return the frozen base in `train.mixed_precision` on the CPU, with a new adapter keyed by `train.seed`."""
    part = pretrained_part(config.model, "transformer")
    precision = part.precision(config.train.mixed_precision)
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        str(part.folder), variant=part.variant, use_safetensors=True, dtype=DTYPES[precision]
    )
    transformer.requires_grad_(False).eval()
    add_adapter(transformer, config.train)
    return transformer


def add_adapter(transformer: CogVideoXTransformer3DModel, train: Train) -> None:
    """Add the LoRA as fp32 masters. Raises `UsageError` if a target module is not found."""
    lora = LoraConfig(
        r=train.lora_rank,
        lora_alpha=train.lora_alpha,
        lora_dropout=train.lora_dropout,
        target_modules=list(train.lora_target_modules),
        init_lora_weights=True,
        use_rslora=train.use_rslora,
        use_dora=train.use_dora,
    )
    where = f"train.lora_target_modules = {list(train.lora_target_modules)}"
    for target in train.lora_target_modules:  # peft accepts a list of which one is found
        if not any(f".{name}".endswith(f".{target}") for name, _ in transformer.named_modules()):
            raise UsageError(f"{where}: the transformer has no layer {target}")
    device = transformer.device
    with torch.random.fork_rng():
        torch.manual_seed(seeding.integer_seed("adapter", train.seed))
        try:
            transformer.add_adapter(lora)
        except ValueError as error:
            raise UsageError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device, torch.float32)


def adapter_weights(transformer: CogVideoXTransformer3DModel) -> dict[str, Tensor]:
    """Return the adapter's tensors under peft's names, sharing the model's memory."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(transformer)
    return weights


def load_adapter_weights(transformer: CogVideoXTransformer3DModel, weights: Mapping[str, Tensor]) -> None:
    """Copy tensors into the adapter, bit for bit; the names must be the adapter's own."""
    own = adapter_weights(transformer)
    assert own.keys() == weights.keys(), sorted(own.keys() ^ weights.keys())[:4]
    set_peft_model_state_dict(transformer, dict(weights))
