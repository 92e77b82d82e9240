"""Components of a pretrained pipeline on disk: a local folder or a hub snapshot, safetensors only."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from shared.config import Model
from shared.errors import UsageError, one_line
from shared.fingerprint import key_of, sha256_files

FileMark = tuple[int, int, int, int]
"""Size in bytes, mtime and ctime in nanoseconds, inode; the file is hashed only after one of them changed.

A program can set the mtime back, the ctime it cannot."""
WANTED_SUFFIXES = (".json", ".safetensors", ".model")
"""Files of a component to fetch: configs, weights, the tokenizer's model."""
JSON_LIMIT = 64 * 2**20
"""Most bytes of a config or an index of weight files."""
SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
UNIMPORTANT_SETTINGS = {"_diffusers_version", "_name_or_path", "transformers_version", "architectures"}


@dataclass(frozen=True, slots=True)
class Component:
    """A sub-folder of the pipeline: its config and the weight files that diffusers or transformers load."""

    folder: Path
    variant: str | None
    weights: tuple[Path, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_config(self.folder / "config.json")

    @property
    def settings(self) -> dict[str, Any]:
        """The config without paths and versions."""
        return {name: value for name, value in self.config.items() if name not in UNIMPORTANT_SETTINGS}

    @property
    def marks(self) -> tuple[FileMark, ...]:
        """Marks of the weight files in the order of their names; no file is opened."""
        statuses = [path.stat() for path in sorted(self.weights)]
        return tuple((found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino) for found in statuses)

    def sha256(self) -> list[str]:
        """Return the sorted hashes of the weight files, whatever their names. Local files are read whole."""
        return sorted(sha256_files(self.weights).values())

    def dtype(self) -> str:
        """Return the published precision, "fp32", "fp16" or "bf16": that of most weights. Only headers are read."""
        totals: Counter[str] = Counter()
        for path in self.weights:
            totals.update(_element_counts(path))
        return _most_common_dtype(totals, str(self.folder))

    def precision(self, requested: str) -> str:
        """Return the requested precision; "auto" is the published one."""
        return self.dtype() if requested == "auto" else requested


def base_key(part: Component, weights: str) -> str:
    """Return the key of a component's config and weights, given the key of `Component.sha256`."""
    return key_of({"weights": weights, "config": part.settings})


def pretrained_folder(model: Model, name: str, *, download: bool = True) -> Path:
    """Return the folder of a component such as "vae", of the local checkpoint or fetched alone from the hub.

    Raises `UsageError` if the folder is not found, or is not on this machine and `download` is False.
    """
    return _find(model, f"{name}/", *(f"{name}/*{suffix}" for suffix in WANTED_SUFFIXES), download=download)


def pretrained_config(model: Model, name: str) -> dict[str, Any]:
    """Read the config of a component, fetched alone from the hub. Raises `UsageError` if the file is not found."""
    file = f"{name}/{'scheduler_config.json' if name == 'scheduler' else 'config.json'}"
    return read_config(_find(model, file, file))


def load_scheduler(model: Model, requested: str) -> Any:
    """Return the checkpoint's scheduler, or with its settings diffusers' "ddim" or "dpm" of CogVideoX."""
    import diffusers

    config = pretrained_config(model, "scheduler")
    name = SCHEDULERS.get(requested, str(config.get("_class_name")))
    if name not in SCHEDULERS.values():
        expected = " or ".join(SCHEDULERS.values())
        raise UsageError(f"scheduler config: expected {expected}, got {name}; set sample.scheduler")
    return getattr(diffusers, name).from_config(config)


def pretrained_dtype(model: Model, name: str) -> str:
    """Return `Component.dtype`; of weights on the hub that are not on this machine, only headers are fetched."""
    part = present_part(model, name)
    if part is None and not Path(model.pretrained_model_name_or_path).is_dir():
        return _most_common_dtype(_element_counts_on_hub(model, name), f"{model.pretrained_model_name_or_path}/{name}")
    return (part or pretrained_part(model, name)).dtype()


def pretrained_part(model: Model, name: str, *, download: bool = True) -> Component:
    """Return a component with weights. Raises `UsageError` that names a missing or a pickled file."""
    folder, variant = pretrained_folder(model, name, download=download), model.variant
    weights = weight_files(folder, variant)
    if not weights and variant is not None and name == "text_encoder":
        variant, weights = None, weight_files(folder, None)  # published variants leave T5 out
    if not weights:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        what = f"only pickled weights ({pickles[0]}), which are not loaded" if pickles else "no safetensors weights"
        of_variant = f" of variant {variant!r}" if variant else ""
        raise UsageError(f"{folder}: {what}{of_variant}; convert them to safetensors or choose another checkpoint")
    return Component(folder, variant, weights)


def present_part(model: Model, name: str) -> Component | None:
    """Return a component if all its weights are on this machine; nothing is downloaded."""
    with suppress(UsageError):
        return pretrained_part(model, name, download=False)
    return None


def weight_files(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """Return the safetensors files that diffusers or transformers load from `folder`: one, or those of an index."""
    dot = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        single = folder / f"{stem}{dot}.safetensors"
        if single.is_file():
            return (single,)
        index = folder / f"{stem}.safetensors.index{dot}.json"
        if index.is_file():
            shards = read_config(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise UsageError(f"{index}: not an index of safetensors files; fetch it again")
            names = sorted(set(shards.values()))
            missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
            if missing or not names:
                shown = ", ".join(missing) or "none named"
                raise UsageError(f"{index}: weight files not found: {shown}; fetch them again")
            return tuple(folder / name for name in names)
    return ()


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `UsageError` that names the file."""
    try:
        if (size := path.stat().st_size) > JSON_LIMIT:
            raise ValueError(f"{size} bytes; the limit is {JSON_LIMIT} bytes")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: not a JSON object; fetch it again")
    return config


def _most_common_dtype(elements: Counter[str], where: str) -> str:
    """Return the dtype with most elements, under its name in configs."""
    found = max(elements, key=lambda name: elements[name], default="")
    names = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    if found not in names:
        raise UsageError(
            f"{where}: expected F32, F16 or BF16 weights, got {found or 'none'}; choose another checkpoint"
        )
    return names[found]


def _element_counts(path: Path) -> Counter[str]:
    """Count the elements of each dtype. Raises `UsageError` for a file that is not whole safetensors."""
    from safetensors import SafetensorError, safe_open

    elements: Counter[str] = Counter()
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                elements[tensor.get_dtype()] += prod(tensor.get_shape())
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    return elements


def _find(model: Model, name: str, *patterns: str, download: bool = True) -> Path:
    """Return a path of the checkpoint; from the hub, files of `patterns` are fetched, or found on this machine."""
    from huggingface_hub import snapshot_download

    root = Path(model.pretrained_model_name_or_path)
    if not root.is_dir():
        _refuse_mistyped_folder(root)
        with _hub(model):
            snapshot = snapshot_download(
                model.pretrained_model_name_or_path,
                revision=model.revision,
                cache_dir=model.model_cache_dir,
                allow_patterns=list(patterns),
                local_files_only=not download,
            )
        root = Path(snapshot)
    if not (root / name).exists():
        raise UsageError(
            f"model.pretrained_model_name_or_path = {str(root)!r}: {name} not found; "
            "expected the layout of diffusers' pipelines"
        )
    return root / name


def _refuse_mistyped_folder(path: Path) -> None:
    """Raise `UsageError` for a name with a separator that a local folder nearly has; it is not tried on the hub."""
    if len(path.parts) > 1 and path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1)
        if near:
            hint = f"did you mean {path.parent / near[0]}?"
            raise UsageError(f"model.pretrained_model_name_or_path = {str(path)!r}: not found; {hint}")


def _element_counts_on_hub(model: Model, name: str) -> Counter[str]:
    """Count the elements of each dtype in a component's weight files from their headers."""
    from huggingface_hub import HfApi

    repository, hub = model.pretrained_model_name_or_path, HfApi()
    variant = re.escape(f".{model.variant}" if model.variant else "")
    wanted = re.compile(rf"{name}/[a-z_]+(-\d+-of-\d+)?{variant}(-\d+-of-\d+)?\.safetensors")
    elements: Counter[str] = Counter()
    with _hub(model):
        for file in hub.list_repo_files(repository, revision=model.revision):
            if wanted.fullmatch(file):
                found = hub.parse_safetensors_file_metadata(repository, file, revision=model.revision)
                elements.update(found.parameter_count)
    return elements


@contextmanager
def _hub(model: Model) -> Iterator[None]:
    """Raise the errors of the hub as `UsageError` of one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UsageError(
            f"model.pretrained_model_name_or_path = {model.pretrained_model_name_or_path!r}: "
            f"neither a local folder nor a reachable hub model ({one_line(error)}); check the name and the network"
        ) from None
