"""LoRA files of CogVideoX, from and for diffusers, peft and ComfyUI, and from kohya's trainers."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8

from shared.errors import DataError, UsageError, one_line

PREFIX = "transformer."
METADATA_KEY = "lora_adapter_metadata"
"""Header key of the adapter's settings in diffusers (`diffusers/loaders/lora_base.py`)."""
DIGEST_KEY = "precog_sha256"
"""Header key of `adapter_digest`."""
CONFIG_KEY, VIEW_KEY, BASE_KEY, STEPS_KEY = "precog_config", "precog_view", "precog_base", "precog_steps"
"""Header keys of `config_key`, the view's hash, `base_key` and the number of optimizer steps."""
LoraFormat = Literal["diffusers", "peft", "comfyui"]
PREFIXES: dict[LoraFormat, str] = {"peft": "base_model.model.", "diffusers": PREFIX, "comfyui": "diffusion_model."}
FOREIGN_PREFIXES = (*PREFIXES.values(), "lora_unet_", "lora_transformer_")
"""Beginnings of names in the files of peft, diffusers, ComfyUI's trainers and kohya's scripts."""
COMFYUI_NAMES = {
    "transformer_blocks.": "blocks.",
    ".attn1.to_q": ".q",
    ".attn1.to_k": ".k",
    ".attn1.to_v": ".v",
    ".attn1.to_out.0": ".attn_out",
    ".ff.net.0.proj": ".ff_proj",
    ".ff.net.2": ".ff_out",
    "_embedding.linear_": "_embedding_linear_",
}
"""diffusers' names -> those of ComfyUI's own CogVideoX, for writing and reading; other names are the same.

`comfy/ldm/cogvideo/model.py` names the layers. `comfy/lora.py` takes `diffusion_model.` and a layer's name, and
`comfy/weight_adapter/lora.py` takes `.lora_A.weight`, `.lora_B.weight` and `.alpha`, which it divides by the rank.
"""
PARTS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "lora.down.weight": "lora_A.weight"}
PARTS |= {"lora.up.weight": "lora_B.weight", "lora_A.default.weight": "lora_A.weight"}
PARTS |= {"lora_B.default.weight": "lora_B.weight", "lora_magnitude_vector.default.weight": "lora_magnitude_vector"}
NAME = re.compile(r"(.+)\.(alpha|lora[_.][a-zA-Z_]+(?:\.default)?(?:\.weight)?)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraFile:
    """The tensors of a LoRA file under peft's names, and the settings that scale them."""

    weights: dict[str, Tensor]
    """float32; `lora_A` [r,in], `lora_B` [out,r]."""
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    header: dict[str, str]
    """The file's own header."""

    @property
    def scale(self) -> float:
        """Factor of B @ A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of peft's `LoraConfig`; rsLoRA and DoRA only where on: diffusers passes on all that it finds."""
        kinds = {name: True for name in ("use_rslora", "use_dora") if getattr(self, name)}
        return {"r": self.rank, "lora_alpha": self.alpha, "target_modules": self.modules, **kinds}

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


def pack_lora(weights: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """Return a safetensors file of tensors under their final names, with the header and its digest.

    The same content gives the same bytes; safetensors itself orders the header at random.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    packed = save(tensors, {**header, DIGEST_KEY: adapter_digest(tensors, header)})
    start = 8 + int.from_bytes(packed[:8], "little")
    head = json.loads(packed[8:start])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + packed[start:]


def read_header(path: Path) -> dict[str, str] | None:
    """Return the header of a safetensors file; None if the file cannot be read."""
    try:
        with safe_open(path, framework="numpy") as tensors:
            return dict(tensors.metadata() or {})
    except (OSError, SafetensorError):
        return None


def diffusers_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the header that gives diffusers the fields of `LoraConfig`."""
    prefixed = {f"{PREFIX}{name}": value for name, value in settings.items()}
    return {"format": "pt", METADATA_KEY: json.dumps(prefixed, sort_keys=True)}


def comfyui_name(module: str) -> str:
    """Return the name of a layer in ComfyUI's own CogVideoX."""
    for ours, theirs in COMFYUI_NAMES.items():
        module = module.replace(ours, theirs)
    return module


def merged_weight(lora: LoraFile, module: str, weight: Tensor) -> Tensor:
    """Return W + scale * B @ A in float32 [out,in]; DoRA gives each row its trained length (arXiv 2402.09353)."""
    down, up = (lora.weights[f"{module}.lora_{side}.weight"] for side in "AB")
    merged = weight.float() + lora.scale * (up @ down)
    lengths = lora.weights.get(f"{module}.lora_magnitude_vector")
    return merged if lengths is None else merged * (lengths / merged.norm(dim=1))[:, None]


def read_lora(path: Path, modules: Iterable[str] | None, field: str, alpha: float | None = None) -> LoraFile:
    """Read a LoRA file for a transformer with these modules; None takes the modules of an export as they are.

    A file without alpha is taken with `alpha` and a warning. Raises `UsageError`, naming `field`, for a file that is no
    LoRA of the transformer or has no alpha, and `DataError` for one of ours whose bytes have changed.
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
    if modules is None:
        modules = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors}
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
    rank = ranks.pop()
    if not alphas and alpha is None:
        beside = path.with_name("adapter_config.json")
        raise UsageError(f'{where}: alpha not found; write {{"lora_alpha": {rank}}} (or the trainer\'s) to {beside}')
    if not alphas:
        logger.warning("%s: the file has no alpha; train.lora_alpha = %g is used", where, alpha)
    stored = alphas.pop() if alphas else float(alpha or 0)
    if not 0 < stored < math.inf:
        raise UsageError(f"{where}: alpha must be positive, got {stored:g}; use another LoRA")
    kinds = {name: bool(settings.get(name)) for name in ("use_rslora", "use_dora")}
    return LoraFile(weights=weights, rank=rank, alpha=stored, header=header, **kinds)


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
    spellings = [(name, spelling) for name in modules for spelling in (name, comfyui_name(name))]
    known = {form: name for name, spelling in spellings for form in (spelling, spelling.replace(".", "_"))}
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
