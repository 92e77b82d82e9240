"""LoRA files of CogVideoX, written by diffusers, peft, ComfyUI's or kohya's trainers, read under peft's names."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from shared.errors import DataError, UsageError, one_line

PREFIX = "transformer."
METADATA_KEY = "lora_adapter_metadata"
"""Header key of the adapter's settings in diffusers (`diffusers/loaders/lora_base.py`)."""
DIGEST_KEY = "precog_sha256"
"""Header key of `adapter_digest`."""
FOREIGN_PREFIXES = ("base_model.model.", PREFIX, "diffusion_model.", "lora_unet_", "lora_transformer_")
"""Beginnings of names in the files of peft, diffusers, ComfyUI's trainers and kohya's scripts."""
PARTS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "lora.down.weight": "lora_A.weight"}
PARTS |= {"lora.up.weight": "lora_B.weight", "lora_A.default.weight": "lora_A.weight"}
PARTS |= {"lora_B.default.weight": "lora_B.weight"}
NAME = re.compile(r"(.+)\.(alpha|lora[_.][a-zA-Z_]+(?:\.default)?(?:\.weight)?)")


@dataclass(frozen=True)
class LoraFile:
    """The tensors of a LoRA file under peft's names, and the settings that scale them."""

    weights: dict[str, Tensor]
    """float32; `lora_A` [r,in], `lora_B` [out,r]."""
    rank: int
    alpha: float | None
    """None if neither the file nor an adapter_config.json beside the file says alpha."""
    use_rslora: bool
    use_dora: bool

    @property
    def modules(self) -> list[str]:
        """The adapted linear layers."""
        return sorted({name.partition(".lora_")[0] for name in self.weights})


def adapter_digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Return the sha256 of names, shapes, dtypes and bytes of the tensors, and of the other entries of the header."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != DIGEST_KEY}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {(*value.shape,)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def read_lora(path: Path, modules: Iterable[str], field: str) -> LoraFile:
    """Read a LoRA file for a transformer with these modules.

    Raises `UsageError`, naming `field`, for a file that is no LoRA of the transformer, and `DataError` for one of ours
    whose bytes have changed.
    """
    where = f"{field} = {str(path)!r}"
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = _settings(path, header)
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}: cannot be read as a LoRA ({one_line(error)}); name a .safetensors file") from None
    ours = any(name.startswith("precog_") for name in header)
    if ours and header.get(DIGEST_KEY) != adapter_digest(tensors, header):
        raise DataError(f"{where}: the weights' sha256 is not the one in the header; copy or export the file again")
    weights, alphas, unknown = _translate(tensors, modules)
    if unknown or not weights:
        example = f", for example {unknown[0]}" if unknown else ""
        raise UsageError(
            f"{where}: {len(weights)} tensors belong to this model and {len(unknown)} do not{example}; "
            "use a LoRA of this model"
        )
    ranks = {value.shape[0] for name, value in weights.items() if name.endswith("lora_A.weight") and value.ndim == 2}
    alphas |= {float(settings["lora_alpha"])} if not alphas and settings.get("lora_alpha") is not None else set()
    if len(ranks) != 1 or len(alphas) > 1:
        found = f"ranks {sorted(ranks)} and alphas {sorted(alphas)}"
        raise UsageError(f"{where}: expected one rank and one alpha for all layers, got {found}; use another LoRA")
    return LoraFile(
        weights=weights,
        rank=ranks.pop(),
        alpha=alphas.pop() if alphas else None,
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
    )


def _settings(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Return `LoraConfig`'s fields from diffusers' header, peft's adapter_config.json or kohya's header."""
    beside = path.with_name("adapter_config.json")
    if METADATA_KEY in header:
        stored = json.loads(header[METADATA_KEY])
    elif beside.is_file():
        stored = json.loads(beside.read_text("utf-8"))
    else:
        stored = {"lora_alpha": header.get("ss_network_alpha")}
    return {name.removeprefix(PREFIX): value for name, value in stored.items()}


def _translate(
    tensors: Mapping[str, Tensor], modules: Iterable[str]
) -> tuple[dict[str, Tensor], set[float], list[str]]:
    """Return the weights under peft's names, the values of alpha tensors, and the names that fit no module."""
    known = {spelling: name for name in modules for spelling in (name, name.replace(".", "_"))}
    weights: dict[str, Tensor] = {}
    alphas: set[float] = set()
    unknown: list[str] = []
    for name, value in sorted(tensors.items()):
        match = NAME.fullmatch(name)
        spelled, part = match.groups() if match else (name, "")
        for prefix in FOREIGN_PREFIXES:
            spelled = spelled.removeprefix(prefix)
        if spelled not in known or not part:
            unknown.append(name)
        elif part == "alpha":
            alphas.add(float(value))
        else:
            weights[f"{known[spelled]}.{PARTS.get(part, part)}"] = value.float()
    return weights, alphas, unknown
