"""The parts of a pretrained pipeline on disk: a local folder or a hub snapshot, safetensors only."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import Model
from shared.errors import UsageError

HEADER_BYTES = 100 * 2**20
"""The largest safetensors header the library itself accepts."""


@dataclass(frozen=True, slots=True)
class Part:
    """One sub-folder of the pipeline: its config and the weight files that would be loaded."""

    folder: Path
    variant: str | None
    weights: tuple[Path, ...]

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder / "config.json")

    def dtype(self) -> str:
        """The published precision: "fp32", "fp16" or "bf16", by the bytes of most weights."""
        totals: dict[str, int] = {}
        for path in self.weights:
            for entry in _header(path).values():
                start, end = entry.get("data_offsets", (0, 0))
                totals[entry.get("dtype", "")] = totals.get(entry.get("dtype", ""), 0) + end - start
        names = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
        found = max(totals, key=lambda name: totals[name], default="")
        if found not in names:
            raise UsageError(f"{self.folder}: weights are {found or 'empty'}; expected F32, F16 or BF16 safetensors")
        return names[found]


def pretrained_folder(model: Model, name: str) -> Path:
    """The folder of a part such as "vae": inside the local checkpoint, or fetched from the hub (that part alone).

    Raises `UsageError` if it is not there.
    """
    root = Path(model.pretrained_model_name_or_path)
    if not root.is_dir():
        root = _fetch(model, name)
    folder = root / name
    if not folder.is_dir():
        raise UsageError(f"model.pretrained_model_name_or_path = {str(root)!r}: has no {name}/ folder")
    return folder


def pretrained_part(model: Model, name: str) -> Part:
    """A part with weights; raises `UsageError` naming what is missing, or what is a pickle."""
    folder = pretrained_folder(model, name)
    variant, weights = model.variant, weight_files(folder, model.variant)
    if not weights and variant is not None and name == "text_encoder":
        variant, weights = None, weight_files(folder, None)  # published variants leave T5 out
    if not weights:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        what = f"only pickled weights ({pickles[0]}), which are never loaded" if pickles else "no safetensors weights"
        of_variant = f" of variant {variant!r}" if variant else ""
        raise UsageError(f"{folder}: {what}{of_variant}; convert them to safetensors or choose another checkpoint")
    return Part(folder, variant, weights)


def weight_files(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """The safetensors files that diffusers or transformers would load from here: one file, or an index's shards."""
    dot = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        single = folder / f"{stem}{dot}.safetensors"
        if single.is_file():
            return (single,)
        index = folder / f"{stem}.safetensors.index{dot}.json"
        if index.is_file():
            names = sorted(set(read_config(index).get("weight_map", {}).values()))
            missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
            if missing or not names:
                raise UsageError(f"{index}: names weight files that are not there: {', '.join(missing) or 'none'}")
            return tuple(folder / name for name in names)
    return ()


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object; raises `UsageError` naming the file."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: not a JSON object")
    return config


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 2 <= length <= HEADER_BYTES:
            raise UsageError(f"{path}: not a safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError:
            raise UsageError(f"{path}: not a safetensors file") from None
    header.pop("__metadata__", None)
    return header


def _fetch(model: Model, name: str) -> Path:
    """Download one part of a hub repository; the root of the snapshot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        root = snapshot_download(
            model.pretrained_model_name_or_path,
            revision=model.revision,
            cache_dir=model.model_cache_dir,
            allow_patterns=[f"{name}/*.json", f"{name}/*.safetensors", f"{name}/*.model"],
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"model.pretrained_model_name_or_path = {model.pretrained_model_name_or_path!r}: "
            f"neither a local folder nor a hub model within reach ({reason})"
        ) from None
    return Path(root)
