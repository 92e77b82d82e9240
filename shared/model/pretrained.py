"""The parts of a pretrained pipeline on disk: a local folder or a hub snapshot, safetensors only."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from shared.config import Model
from shared.errors import UsageError
from shared.fingerprint import sha256_files

FileMark = tuple[int, int]
"""Size in bytes and mtime in nanoseconds: unchanged means the same bytes, changed means they have to be hashed."""
CONFIG_NAMES = {"scheduler": "scheduler_config.json"}
"""Of parts whose config is not config.json."""
UNIMPORTANT_SETTINGS = {"_diffusers_version", "_name_or_path", "transformers_version", "architectures"}


@dataclass(frozen=True, slots=True)
class Part:
    """One sub-folder of the pipeline: its config and the weight files that would be loaded."""

    folder: Path
    variant: str | None
    weights: tuple[Path, ...]

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder / "config.json")

    @property
    def settings(self) -> dict[str, Any]:
        """The config without what names a place or a version."""
        return {name: value for name, value in self.config.items() if name not in UNIMPORTANT_SETTINGS}

    @property
    def marks(self) -> tuple[FileMark, ...]:
        """Of the weight files, by name; nothing is opened."""
        statuses = [path.stat() for path in sorted(self.weights)]
        return tuple((status.st_size, status.st_mtime_ns) for status in statuses)

    def sha256(self) -> list[str]:
        """Sorted hashes of the weight files; what they are called does not matter. Reads local files whole."""
        return sorted(sha256_files(self.weights).values())

    def dtype(self) -> str:
        """The published precision: "fp32", "fp16" or "bf16", that of most weights; only headers are read."""
        totals: Counter[str] = Counter()
        for path in self.weights:
            for dtype, size in _tensors(path):
                totals[dtype] += size
        return _most(totals, str(self.folder))

    def precision(self, requested: str) -> str:
        """The one that is asked for, where "auto" is the published one."""
        return self.dtype() if requested == "auto" else requested


def pretrained_folder(model: Model, name: str, *, download: bool = True) -> Path:
    """The folder of a part such as "vae": inside the local checkpoint, or fetched from the hub (that part alone).

    Raises `UsageError` if it is not there, or not on this machine and not to be downloaded.
    """
    root = Path(model.pretrained_model_name_or_path)
    if not root.is_dir():
        root = _fetch(model, name, local_files_only=not download)
    folder = root / name
    if not folder.is_dir():
        raise UsageError(f"model.pretrained_model_name_or_path = {str(root)!r}: has no {name}/ folder")
    return folder


def pretrained_config(model: Model, name: str) -> dict[str, Any]:
    """The config of a part; of a hub model that file alone is fetched. Raises `UsageError` if it is not there."""
    file = f"{name}/{CONFIG_NAMES.get(name, 'config.json')}"
    root = Path(model.pretrained_model_name_or_path)
    path = root / file if root.is_dir() else _fetch_file(model, file)
    if not path.is_file():
        raise UsageError(f"model.pretrained_model_name_or_path = {str(root)!r}: has no {file}")
    return read_config(path)


def pretrained_dtype(model: Model, name: str) -> str:
    """As `Part.dtype`; of a hub model whose weights are not here, their headers alone are fetched."""
    part = present_part(model, name)
    if part is None and not Path(model.pretrained_model_name_or_path).is_dir():
        return _most(_headers_on_hub(model, name), f"{model.pretrained_model_name_or_path}/{name}")
    return (part or pretrained_part(model, name)).dtype()


def pretrained_part(model: Model, name: str, *, download: bool = True) -> Part:
    """A part with weights; raises `UsageError` naming what is missing, or what is a pickle."""
    return _part(pretrained_folder(model, name, download=download), model.variant)


def present_folder(model: Model, name: str) -> Path | None:
    """The folder of a part if this machine has it already; nothing is downloaded."""
    with suppress(UsageError):
        return pretrained_folder(model, name, download=False)
    return None


def present_part(model: Model, name: str) -> Part | None:
    """A part if this machine has it with all its weights; nothing is downloaded."""
    with suppress(UsageError):
        return pretrained_part(model, name, download=False)
    return None


def weight_files(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """The safetensors files that diffusers or transformers would load from here: one file, or an index's shards."""
    dot = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        single = folder / f"{stem}{dot}.safetensors"
        if single.is_file():
            return (single,)
        index = folder / f"{stem}.safetensors.index{dot}.json"
        if index.is_file():
            names = _indexed(index)
            missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
            if missing or not names:
                raise UsageError(f"{index}: names weight files that are not there: {', '.join(missing) or 'none'}")
            return tuple(folder / name for name in names)
    return ()


def _indexed(index: Path) -> list[str]:
    """The files that an index of shards names."""
    shards = read_config(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UsageError(f"{index}: not an index of safetensors files")
    return sorted(set(shards.values()))


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object; raises `UsageError` naming the file."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: not a JSON object")
    return config


def _part(folder: Path, variant: str | None) -> Part:
    weights = weight_files(folder, variant)
    if not weights and variant is not None and folder.name == "text_encoder":
        variant, weights = None, weight_files(folder, None)  # published variants leave T5 out
    if not weights:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        what = f"only pickled weights ({pickles[0]}), which are never loaded" if pickles else "no safetensors weights"
        of_variant = f" of variant {variant!r}" if variant else ""
        raise UsageError(f"{folder}: {what}{of_variant}; convert them to safetensors or choose another checkpoint")
    return Part(folder, variant, weights)


def _most(elements: Mapping[str, int], where: str) -> str:
    """The name that configs use for the dtype with most elements."""
    found = max(elements, key=lambda name: elements[name], default="")
    names = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    if found not in names:
        raise UsageError(f"{where}: weights are {found or 'empty'}; expected F32, F16 or BF16 safetensors")
    return names[found]


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Dtype and number of elements of each tensor; raises `UsageError` for a torn file or one of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                yield tensor.get_dtype(), prod(tensor.get_shape())
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def _fetch(model: Model, name: str, *, local_files_only: bool) -> Path:
    """Download one part of a hub repository, or find what is there of it; the root of the snapshot."""
    from huggingface_hub import snapshot_download

    with _hub(model):
        root = snapshot_download(
            model.pretrained_model_name_or_path,
            revision=model.revision,
            cache_dir=model.model_cache_dir,
            allow_patterns=[f"{name}/*.json", f"{name}/*.safetensors", f"{name}/*.model"],
            local_files_only=local_files_only,
        )
    return Path(root)


def _fetch_file(model: Model, file: str) -> Path:
    """Download one file of a hub repository, or find it."""
    from huggingface_hub import hf_hub_download

    with _hub(model):
        repository, revision = model.pretrained_model_name_or_path, model.revision
        return Path(hf_hub_download(repository, file, revision=revision, cache_dir=model.model_cache_dir))


def _headers_on_hub(model: Model, name: str) -> Counter[str]:
    """Elements of each dtype in a part's weight files."""
    from huggingface_hub import HfApi

    repository, hub = model.pretrained_model_name_or_path, HfApi()
    variant = re.escape(f".{model.variant}" if model.variant else "")
    shard = r"(-\d+-of-\d+)?"
    wanted = re.compile(rf"{name}/(diffusion_pytorch_model|model)({variant}{shard}|{shard}{variant})\.safetensors")
    elements: Counter[str] = Counter()
    with _hub(model):
        for file in hub.list_repo_files(repository, revision=model.revision):
            if wanted.fullmatch(file):
                found = hub.parse_safetensors_file_metadata(repository, file, revision=model.revision)
                elements.update(found.parameter_count)
    return elements


@contextmanager
def _hub(model: Model) -> Iterator[None]:
    """Turns what the hub raises into one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"model.pretrained_model_name_or_path = {model.pretrained_model_name_or_path!r}: "
            f"neither a local folder nor a hub model within reach ({reason})"
        ) from None
