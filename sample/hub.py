"""The folder of an adapter on the hub: weights, model card, curves and samples; `precog push`."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sample.export import find_adapters, read_run_adapter, write_lora
from shared import console
from shared.cache.storage import open_storage
from shared.cache.view import View, read_view
from shared.config import Config, field_value, fields_shaping
from shared.config_file import load_config
from shared.errors import CacheError
from shared.fingerprint import sha256_file
from shared.hub import check_repository, upload_folder
from shared.model.adapters import STEPS_KEY, VIEW_KEY, LoraFile
from shared.model.pretrained import pretrained_config
from shared.run_folder import ADAPTER, BEST, EXPORT, read_metrics

FOLDER = "hub"
"""Folder in a run folder with the files that are uploaded."""
CURVE = "loss.png"
MAX_CAPTIONS = 10_000


def push(run: Path, repository: str, *, dry_run: bool, public: bool, with_captions: bool) -> dict[str, str]:
    """Write the folder and upload it unless `dry_run`; return the object of `--json`.

    Raises `UsageError` if the run has no adapter or the repository cannot be written.
    """
    check_repository(repository)
    folder = write_hub_folder(run, repository, with_captions=with_captions)
    if dry_run:
        return {"folder": str(folder)}
    return {"folder": str(folder), "url": upload_folder(folder, repository, "model", public=public)}


def write_hub_folder(run: Path, repository: str, *, with_captions: bool) -> Path:
    """Write the files of the repository into RUN/hub, in place of earlier ones, and return the folder."""
    config, adapter, folder = load_config(run / "config.toml"), read_run_adapter(run), run / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    name = repository.partition("/")[2]
    write_lora(adapter, "diffusers", folder, name, "fp32")
    files = {"last": ADAPTER}
    if not adapter.use_dora:
        write_lora(adapter, "comfyui", folder / "comfyui", name, "fp32")
        files["for ComfyUI"] = f"comfyui/{name}.safetensors"
    best = read_run_adapter(run, best=True) if (run / EXPORT / BEST / ADAPTER).is_file() else adapter
    if best.header.get(STEPS_KEY) != adapter.header.get(STEPS_KEY):
        write_lora(best, "diffusers", folder / BEST, name, "fp32")
        files["best by held-out loss"] = f"{BEST}/{ADAPTER}"
    if (run / CURVE).is_file():
        shutil.copyfile(run / CURVE, folder / CURVE)
    view, samples = find_view(config, adapter), copy_samples(run, config, folder)
    captions = sorted({caption for row in view.rows for caption in row.captions if caption}) if view else []
    if with_captions:
        (folder / "captions.txt").write_text("\n".join(captions[:MAX_CAPTIONS]) + "\n", "utf-8")
    else:  # a sample's prompt may be a caption
        shown = {prompt for prompt in samples.values() if view and not any(caption in prompt for caption in captions)}
        samples = {
            file: prompt if prompt in shown else config.data.id_token or "..." for file, prompt in samples.items()
        }
    text = [header(config, samples), *about(run, config, adapter, files, samples), *data_lines(view)]
    text += [*training(run, config), usage(config, adapter, repository)]
    (folder / "README.md").write_text("\n".join(text), "utf-8")
    return folder


def copy_samples(run: Path, config: Config, folder: Path) -> dict[str, str]:
    """Copy the videos that `precog sample` made with this run's adapters alone; return {file: prompt}."""
    ours = {sha256_file(file) for file in find_adapters(run).values()}
    samples: dict[str, str] = {}
    for record in sorted(config.sample.output_dir.glob("*.json")):
        try:
            stored = json.loads(record.read_bytes())
            used, prompt = {lora["sha256"] for lora in stored["recipe"]["loras"]}, str(stored["prompt"])
        except (ValueError, KeyError, TypeError):
            continue
        if used and used <= ours and record.with_suffix(".mp4").is_file():
            (folder / "samples").mkdir(exist_ok=True)
            file = f"samples/{len(samples):02}.mp4"
            shutil.copyfile(record.with_suffix(".mp4"), folder / file)
            samples[file] = prompt
    return samples


def find_view(config: Config, adapter: LoraFile) -> View | None:
    """Return the view that the adapter was trained on; None, with a warning, if the cache has another or none."""
    try:
        view = read_view(open_storage(config.precompute.cache), config.data.name)
    except CacheError as error:
        console.say(f"warning: the card says nothing of the data: {error}")
        return None
    if adapter.header.get(VIEW_KEY) not in (None, view.hash):
        console.say(f"warning: the card says nothing of the data: view {view.name} has changed since the training")
        return None
    return view


def header(config: Config, samples: Mapping[str, str]) -> str:
    """Return the card's YAML header: what the hub's pages, filters and widget show."""
    from huggingface_hub import ModelCardData

    base, task = base_model(config), "image-to-video" if takes_image(config) else "text-to-video"
    licence: dict[str, Any] = {"license": "apache-2.0"}
    if "2b" not in base.lower():
        link = {"license_link": f"https://huggingface.co/{base}/blob/main/LICENSE"} if "/" in base else {}
        licence = {"license": "other", "license_name": "cogvideox-license", **link}
    data = ModelCardData(
        base_model=base if "/" in base else None,
        library_name="diffusers",
        pipeline_tag=task,
        tags=["cogvideox", "lora", "diffusers-training", task, "template:sd-lora"],
        instance_prompt=config.data.id_token or None,
        widget=[{"text": prompt, "output": {"url": file}} for file, prompt in samples.items()] or None,
        **licence,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def base_model(config: Config) -> str:
    """Return the hub name of the base model, or the last part of a local folder's path."""
    name = config.model.pretrained_model_name_or_path
    return Path(name).name if Path(name).is_dir() else name


def takes_image(config: Config) -> bool:
    """Return whether the base model is image-to-video."""
    shape = pretrained_config(config.model, "transformer")
    return bool(shape["in_channels"] != shape["out_channels"])


def about(
    run: Path, config: Config, adapter: LoraFile, files: Mapping[str, str], samples: Mapping[str, str]
) -> list[str]:
    """Return the lines about base model, trigger, files, curve and samples."""
    steps, token = adapter.header.get(STEPS_KEY, ""), config.data.id_token
    return [
        f"# {run.resolve().name}\n",
        f"A LoRA of rank {adapter.rank} and alpha {adapter.alpha:g} for {base_model(config)}, {steps} steps.\n",
        *([f"Begin the prompt with `{token}`.\n"] if token else []),
        *(f"- `{file}`: {what}" for what, file in files.items()),
        *([f"\n![loss]({CURVE})"] if (run / CURVE).is_file() else []),
        *(f"- [{file}]({file}): {' '.join(prompt.split())}" for file, prompt in samples.items()),
    ]


def data_lines(view: View | None) -> list[str]:
    """Return how many clips of which sizes there are; no caption and no file name."""
    if view is None:
        return []
    train, held_out = view.split("train"), view.split("held_out")
    seconds = sum(row.end_seconds - row.start_seconds for row in train)
    buckets = Counter(str(row.bucket) for row in train)
    return [
        "\n## Data\n",
        f"{len(train)} clips ({seconds:.0f} seconds) to train on, {len(held_out)} held out; frames x height x width:\n",
        *(f"- {bucket}: {count} clips" for bucket, count in sorted(buckets.items())),
    ]


def training(run: Path, config: Config) -> list[str]:
    """Return the held-out loss and the settings that shaped the weights."""
    lines, losses = ["\n## Training\n"], [line for line in read_metrics(run) if "held_out_loss" in line]
    if losses:
        base = [f", {line['base_held_out_loss']:.5f} without" for line in losses if "base_held_out_loss" in line]
        lines.append(f"Held-out loss with the LoRA: {losses[-1]['held_out_loss']:.5f}{''.join(base[:1])}.\n")
    names = {*(name for name in fields_shaping("run") if name.startswith("train.")), "train.learning_rate"}
    settings = [f"| `{name}` | {json.dumps(field_value(config, name))} |" for name in sorted(names)]
    return [*lines, "| setting | value |", "|---|---|", *settings, ""]


def usage(config: Config, adapter: LoraFile, repository: str) -> str:
    """Return the card's example for diffusers."""
    image = takes_image(config)
    kind = f"CogVideoX{'ImageToVideo' if image else ''}Pipeline"
    settings, trigger = config.sample, f"{config.data.id_token} " if config.data.id_token else ""
    loads = "export_to_video, load_image" if image else "export_to_video"
    first = 'image=load_image("first_frame.png"), ' if image else ""
    return f"""## Use

```python
import torch
from diffusers import {kind}
from diffusers.utils import {loads}

dtype = torch.{adapter.header.get("precog_precision", "bfloat16")}
pipe = {kind}.from_pretrained({json.dumps(base_model(config))}, torch_dtype=dtype)
pipe.load_lora_weights({json.dumps(repository)}, weight_name="{ADAPTER}")  # applies its own alpha
pipe.vae.enable_tiling()
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()
video = pipe(
    {json.dumps(f"{trigger}a description of the video", ensure_ascii=False)},
    {first}num_frames={settings.num_frames}, height={settings.height}, width={settings.width},
    num_inference_steps={settings.num_inference_steps}, guidance_scale={settings.guidance_scale:g},
).frames[0]
export_to_video(video, "video.mp4", fps={settings.fps})
```
"""
