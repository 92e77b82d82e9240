"""Write a run's adapter for diffusers, peft or ComfyUI, or merged into the transformer; `precog export`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from shared.atomic_files import replacing
from shared.config_file import load_config
from shared.device import DTYPES
from shared.errors import PrecogError, UsageError
from shared.fingerprint import key_of
from shared.model.adapters import (
    BASE_KEY,
    PREFIXES,
    STEPS_KEY,
    LoraFile,
    LoraFormat,
    comfyui_name,
    diffusers_settings,
    merged_weight,
    pack_lora,
    read_header,
    read_lora,
)
from shared.model.pretrained import base_key, pretrained_part
from shared.run_folder import ADAPTER, BEST, EXPORT

EXPORTS = "exports"
"""Folder in a run folder that `precog export` writes to; `export` stays that of the finished run."""


def export_run(
    run: Path,
    form: LoraFormat | Literal["merged"],
    steps: Sequence[int] = (),
    *,
    best: bool = False,
    precision: str = "auto",
    output: Path | None = None,
) -> list[Path]:
    """Write the adapter of a run in another format, read the files back, compare, and return their paths.

    Of several `steps` the weights' mean is taken. Precision "auto" is fp32, and the checkpoint's own for "merged".
    Raises `UsageError` if the run has no such adapter, `DataError` if the adapter is damaged, and `PrecogError` if a
    file does not read back as written.
    """
    found = read_run_adapter(run, steps, best=best)
    name = "best" if best else f"step-{found.header.get(STEPS_KEY, '').replace(',', '-')}"
    folder = output or run / EXPORTS / "-".join([form, name, *([] if precision == "auto" else [precision])])
    if form == "merged":
        return write_merged(run, found, folder / "transformer", precision)
    return write_lora(found, form, folder, run.resolve().name, "fp32" if precision == "auto" else precision)


def find_adapters(run: Path) -> dict[int, Path]:
    """Return {optimizer steps: file} of the run's checkpoints and exports."""
    files = sorted(run.glob("checkpoint-*/adapter.safetensors"))
    found = {int(file.parent.name.removeprefix("checkpoint-")): file for file in files}
    for file in (run / EXPORT / BEST / ADAPTER, run / EXPORT / ADAPTER):
        header = read_header(file)
        if header is not None and (steps := header.get(STEPS_KEY, "0")).isdecimal():
            found[int(steps)] = file
    return dict(sorted(found.items()))


def read_run_adapter(run: Path, steps: Sequence[int] = (), *, best: bool = False) -> LoraFile:
    """Read the adapter of a run: of the last step, of the lowest held-out loss, or the mean over several steps.

    Raises `UsageError` if there is none, and `DataError` if a file is damaged.
    """
    if best:
        return read_lora(run / EXPORT / BEST / ADAPTER, None, "export/best")
    adapters = find_adapters(run)
    wanted = list(dict.fromkeys(steps)) or [*adapters][-1:]
    if missing := [step for step in wanted if step not in adapters]:
        there = ", ".join(map(str, adapters)) or "none"
        raise UsageError(f"--step {missing[0]}: {run} has no adapter of this step; there are {there}")
    if not wanted:
        raise UsageError(f"{run}: no checkpoint and no export found; give the run folder (train.output_dir)")
    first, *others = (read_lora(adapters[step], None, "adapter") for step in wanted)
    if not others:
        return first
    names = {name: value.shape for name, value in first.weights.items()}
    if any({name: value.shape for name, value in each.weights.items()} != names for each in others):
        raise UsageError(f"--step {','.join(map(str, wanted))}: adapters of different shapes; choose steps of one run")
    mean = {name: torch.stack([each.weights[name].double() for each in (first, *others)]).mean(0) for name in names}
    header = first.header | {STEPS_KEY: ",".join(map(str, wanted))}
    weights = {name: value.float() for name, value in mean.items()}
    return LoraFile(weights, first.rank, first.alpha, first.use_rslora, first.use_dora, header)


def write_lora(found: LoraFile, form: LoraFormat, folder: Path, name: str, precision: str) -> list[Path]:
    """Write an adapter file, and for peft its adapter_config.json, read it back and return the paths.

    ComfyUI divides alpha by the rank, so rsLoRA's scale is folded into its alpha.
    """
    if form == "comfyui" and found.use_dora:
        raise UsageError("--format comfyui: not possible with train.use_dora; use --format merged")
    folder.mkdir(parents=True, exist_ok=True)
    weights = cast(found.weights, DTYPES[precision])
    header = {key: value for key, value in found.header.items() if key.startswith("precog_")}
    tensors = {f"{PREFIXES[form]}{spelled(key, form)}": value for key, value in weights.items()}
    written = [
        folder / {"diffusers": ADAPTER, "peft": "adapter_model.safetensors", "comfyui": f"{name}.safetensors"}[form]
    ]
    if form == "comfyui":
        alphas = {f"{comfyui_name(module)}.alpha": torch.tensor(found.scale * found.rank) for module in found.modules}
        tensors |= {f"{PREFIXES[form]}{key}": value for key, value in alphas.items()}
    elif form == "diffusers":
        header |= diffusers_settings(found.settings)
    else:
        written.append(folder / "adapter_config.json")
        base = found.header.get("precog_base_model")
        with replacing(written[-1]) as pending:
            config = found.settings | {"peft_type": "LORA", "base_model_name_or_path": base}
            pending.write_text(json.dumps(config), "utf-8")
    with replacing(written[0]) as pending:
        pending.write_bytes(pack_lora(tensors, {"format": "pt", **header}))
    again = read_lora(written[0], found.modules, "export")
    same = again.weights.keys() == weights.keys() and abs(again.scale / found.scale - 1) < 1e-6
    if not same or not all(torch.equal(again.weights[key], value.float()) for key, value in weights.items()):
        raise PrecogError(f"{written[0]}: does not read back as written; check the disk and run the command again")
    return written


def spelled(name: str, form: LoraFormat) -> str:
    """Return the name of a weight in a format, without the format's prefix."""
    module, mark, part = name.partition(".lora_")
    return f"{comfyui_name(module) if form == 'comfyui' else module}{mark}{part}"


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights in a dtype; raise `UsageError` if one overflows."""
    found = {name: value.to(dtype) for name, value in weights.items()}
    if bad := [name for name, value in found.items() if not value.isfinite().all()]:
        raise UsageError(f"--precision: {bad[0]} is not finite in {dtype}; use bf16 or fp32")
    return found


def write_merged(run: Path, found: LoraFile, folder: Path, precision: str) -> list[Path]:
    """Write the base transformer with the adapter added, for `from_pretrained`; read it back and return the paths.

    The sum is taken in float32 and rounded once.
    """
    from diffusers import CogVideoXTransformer3DModel

    config = load_config(run / "config.toml")
    part = pretrained_part(config.model, "transformer")
    if found.header.get(BASE_KEY) not in (None, base_key(part, key_of(part.sha256()))):
        model = config.model.pretrained_model_name_or_path
        raise UsageError(f"{run}: trained on other weights than {model} has now; restore those, or set model.revision")
    dtype = DTYPES[part.precision(precision)]
    options = {"variant": part.variant, "use_safetensors": True}
    transformer = CogVideoXTransformer3DModel.from_pretrained(str(part.folder), dtype=DTYPES[part.dtype()], **options)
    layers = dict(transformer.requires_grad_(False).named_modules())
    for module in found.modules:
        merged = {module: merged_weight(found, module, layers[module].weight)}
        layers[module].weight.data = cast(merged, dtype)[module]
    torch.nn.Module.to(transformer, dtype)  # diffusers' own `to` warns of layers that are kept in float32: none here
    transformer.save_pretrained(folder, safe_serialization=True)
    wanted, read = transformer.state_dict(), set[str]()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:  # one at a time, as the whole model may not fit twice
            read |= {name for name in tensors.keys() if torch.equal(tensors.get_tensor(name), wanted[name])}  # noqa: SIM118
    if read != wanted.keys():
        raise PrecogError(f"{folder}: does not read back as written; check the disk and run the command again")
    return sorted(folder.iterdir())
