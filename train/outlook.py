"""What each plan would cost on a GPU, from configs alone: `precog memory`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from diffusers import CogVideoXTransformer3DModel

from shared.config import Config
from shared.device import DTYPES
from shared.errors import CacheError, UsageError
from shared.files import open_storage
from shared.geometry import Bucket
from shared.pretrained import pretrained_folder, pretrained_part, read_config
from shared.variants import Conventions, read_conventions, refusal
from shared.view import read_view
from train.engine import Plan
from train.memory import META, Prediction, candidates, largest_pack, predict_peak
from train.model import add_adapter
from train.modulation import is_frozen

CUDA = torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Outlook:
    """From the fastest plan to the leanest."""

    pack_name: str
    predictions: list[tuple[Plan, Prediction]]


def predict_plans(config: Config) -> Outlook:
    """Every plan that [memory] leaves open, for the largest pack of the view, or of the buckets if there is none yet.

    Raises `UsageError` if [memory] contradicts itself, or no bucket can be trained.
    """
    part = pretrained_part(config.model, "transformer")
    transformer_config = read_config(part.folder / "config.json")
    conventions = read_conventions(
        transformer_config,
        read_config(pretrained_folder(config.model, "vae") / "config.json"),
        read_config(pretrained_folder(config.model, "scheduler") / "scheduler_config.json"),
        drop_learned_positions=config.model.drop_learned_positions,
    )
    if config.train.transformer_engine == "reference":
        raise UsageError("train.transformer_engine = 'reference' has no plans; `precog memory` is about 'packed'")
    buckets, source = _buckets(config, conventions)
    precision = part.dtype() if config.train.mixed_precision == "auto" else config.train.mixed_precision
    with META:
        shallow = CogVideoXTransformer3DModel.from_config(transformer_config | {"num_layers": 1}).requires_grad_(False)
        add_adapter(shallow, config.train)
    pack = largest_pack(config.train, conventions, buckets)
    plans = [replace(plan, compile=False) for plan in candidates(config, CUDA, table_possible=is_frozen(shallow))]
    predictions = [
        (plan, predict_peak(transformer_config, conventions, config.train, plan, pack, DTYPES[precision]))
        for plan in plans
    ]
    name = f"{len(pack)} x {pack[0]}" if len(pack) > 1 else str(pack[0])
    return Outlook(f"{name} ({source}, {precision}, rank {config.train.lora_rank})", predictions)


def _buckets(config: Config, conventions: Conventions) -> tuple[Sequence[Bucket], str]:
    """Of the view if stage 1 has made it, else of the config; and which."""
    try:
        storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
        view = read_view(storage, config.data.name)
    except CacheError:
        frames = [count for count in config.data.frame_buckets if count <= config.data.max_num_frames]
        wanted = [Bucket(count, *size) for count, size in product(frames, config.data.resolutions)]
        fitting = [bucket for bucket in wanted if not refusal(conventions, bucket)]
        if not fitting:
            raise UsageError(f"data: {refusal(conventions, wanted[0]) if wanted else 'no bucket'}") from None
        return fitting, "largest bucket of the config"
    return [row.bucket for row in view.split("train")], f"largest clip of view {view.name}"
