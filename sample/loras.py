"""LoRAs of `precog sample`: found in run folders, loaded into the pipeline's transformer, checked for an effect."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict

from sample.export import find_adapters
from shared import console
from shared.config import Config, SampleLora
from shared.errors import UsageError, one_line
from shared.fingerprint import sha256_file
from shared.model.adapters import PREFIX, read_lora
from shared.model.conventions import Conventions
from shared.run_folder import ADAPTER, BEST, EXPORT

FIELD = "sample.loras"


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file and its strength."""

    label: str
    """For people, such as "demo@300 x0.5"."""
    name: str
    """Name in the pipeline, the same for two strengths of one file."""
    place: Path
    """As the config names it, without RUN@300 resolved."""
    file: Path
    strength: float
    sha256: str
    """Of the file's bytes."""

    @property
    def diffusers_line(self) -> str:
        """The call that loads the file in diffusers; the file says its own alpha."""
        where = f"{json.dumps(str(self.file.parent))}, weight_name={json.dumps(self.file.name)}"
        return f'pipe.load_lora_weights({where}, adapter_name="{self.name}")'

    @property
    def comfyui_line(self) -> str:
        """The command that makes a file for ComfyUI, and the node that loads it."""
        run, at, which = str(self.place).rpartition("@") if not self.place.exists() else (str(self.place), "", "")
        source = f"{run} --{which if which == BEST else f'step {which}'}" if at else run
        made = "" if self.place.is_file() else f"precog export {source} --format comfyui; "
        name = json.dumps(f"{Path(run).resolve().name.removesuffix('.safetensors')}.safetensors")
        return f"{made}LoraLoaderModelOnly, lora_name = {name}, strength_model = {self.strength:g}"


def find_loras(config: Config) -> list[Lora]:
    """Return the LoRAs of `sample.loras`, or the run's export; raises `UsageError` for one that is not found."""
    wanted = config.sample.loras or (SampleLora(path=config.train.output_dir),)
    files = [lora_file(lora.path) for lora in wanted]
    names = {file: f"lora{number}" for number, file in enumerate(dict.fromkeys(files))}
    seen: Counter[str] = Counter()
    loras = []
    for lora, file in zip(wanted, files, strict=True):
        parts = [part for part in lora.path.parts if part not in (ADAPTER, EXPORT)]
        label = f"{parts[-1].removesuffix('.safetensors')} x{lora.strength:g}" if config.sample.loras else "lora"
        seen[label] += 1
        label += f" ({seen[label]})" if seen[label] > 1 else ""
        loras.append(Lora(label, names[file], lora.path, file, lora.strength, sha256_file(file)))
    return loras


def lora_file(place: Path) -> Path:
    """Return the file of a run folder (its export), RUN@300, RUN@best, an export folder or a file itself."""
    run, at, which = str(place).rpartition("@")
    if at and not place.exists():
        steps = find_adapters(Path(run))
        step = steps.get(int(which)) if which.isdecimal() else None
        places = [Path(run) / EXPORT / BEST / ADAPTER] if which == BEST else [step] if step else []
        known = f"; {run} has the steps {', '.join(map(str, steps))}" if steps else ""
    else:
        names = (ADAPTER, f"{EXPORT}/{ADAPTER}", "adapter.safetensors")
        places, known = [place, *(place / name for name in names), *reversed(find_adapters(place).values())], ""
    for path in places:
        if path.is_file():
            return path
    advice = "train first, or name a run folder or a .safetensors file"
    raise UsageError(f"{FIELD}: {place}: adapter not found; {advice}{known}")


def load_lora(pipeline: Any, lora: Lora) -> dict[str, str]:
    """Load a LoRA of any common format into the pipeline's transformer, with its own alpha; return its header.

    Raises `UsageError` if the file is not a LoRA of this model, or changes nothing, and `DataError` if damaged.
    """
    path, transformer = lora.file, pipeline.transformer
    linear = {name for name, layer in transformer.named_modules() if hasattr(layer, "in_features")}
    found = read_lora(path, (name for name in linear if "lora_" not in name and ".base_layer" not in name), FIELD)
    if not any(bool(value.any()) for name, value in found.weights.items() if "lora_B" in name):
        raise UsageError(f"{path}: every lora_B is zero, so the adapter changes nothing; use a trained adapter")
    try:
        pipeline.load_lora_into_transformer(
            {f"{PREFIX}{name}": value for name, value in found.weights.items()},
            transformer,
            adapter_name=lora.name,
            metadata={f"{PREFIX}{name}": value for name, value in found.settings.items()},
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: not an adapter of this checkpoint ({one_line(error)}); use another file") from error
    loaded = get_peft_model_state_dict(transformer, adapter_name=lora.name)
    if missing := sorted(loaded.keys() - found.weights.keys()):
        applied = f"{len(loaded) - len(missing)} tensors applied, {len(missing)} missing"
        raise UsageError(f"{path}: {applied}, for example {missing[0]}; use a complete file")
    console.say(f"{path}: {len(loaded)} tensors applied to {len(found.modules)} layers, 0 missing")
    return found.header


def set_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Let these LoRAs act, and no others; without any, the base model."""
    if loras:
        pipeline.enable_lora()
        pipeline.set_adapters([lora.name for lora in loras], [lora.strength for lora in loras])
    else:
        pipeline.disable_lora()


def warn_of_differences(
    path: Path, header: Mapping[str, str], config: Config, conventions: Conventions, precision: str
) -> None:
    """Print one line if a LoRA with this header was trained on another base, noise schedule or precision."""
    model = config.model.pretrained_model_name_or_path
    used = {
        "base_model": Path(model).name if Path(model).is_dir() else model,
        "revision": config.model.revision or "",
        "precision": precision,
        "snr_shift_scale": f"{conventions.snr_shift_scale:g}",
    }
    trained = {name: header.get(f"precog_{name}", value) for name, value in used.items()}
    if found := [f"{name} {trained[name]!r}, here {used[name]!r}" for name in used if trained[name] != used[name]]:
        console.say(f"warning: {path}: trained with {'; '.join(found)}")


def lines_that_load(loras: Sequence[Lora]) -> dict[str, str]:
    """Return what loads these LoRAs at their strengths in diffusers and in ComfyUI."""
    if not loras:
        return {}
    names, strengths = [lora.name for lora in loras], [lora.strength for lora in loras]
    calls = [*(lora.diffusers_line for lora in loras), f"pipe.set_adapters({json.dumps(names)}, {strengths})"]
    return {"diffusers": "; ".join(calls), "comfyui": "; ".join(lora.comfyui_line for lora in loras)}
