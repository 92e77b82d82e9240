"""What a run is, beside its step: the view, the base model and the settings that a resumed run may not change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CacheError
from shared.fingerprint import Json, key_of, sha256_file
from shared.model.pretrained import FileMark, Part
from shared.run_folder import adapter_file
from train.run import Run

FIXED_FIELDS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "adam_weight_decay",
    "caption_dropout",
    "ema_decay",
    "global_batch_size",
    "lora_alpha",
    "lora_dropout",
    "lora_rank",
    "lora_target_modules",
    "noised_image_dropout",
    "optimizer",
    "seed",
    "snr_gamma",
    "timestep_sampling",
    "use_dora",
    "use_rslora",
)
"""Fields of [train] that a resumed run may not change."""
ORDER = "train.shuffle_shards"
"""The order's name in a run's identity: what `shuffle_shards` came to."""


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen weights of a run, as its checkpoints remember them."""

    sha256: str
    """Of the hashes of all weight files, shortened as keys are."""
    marks: tuple[FileMark, ...]
    """By which the files are known again."""

    def as_json(self) -> dict[str, Json]:
        return {"sha256": self.sha256, "marks": [list(mark) for mark in self.marks]}


def identify_base(transformer: Part, known: Mapping[str, Any] | None) -> Base:
    """As `known` from a checkpoint, if the files have its sizes and times; else they are read and hashed.

    The name of a file from the hub is its hash, so that those are not read either way.
    """
    marks = transformer.marks
    if known is not None and known["marks"] == [list(mark) for mark in marks]:
        return Base(known["sha256"], marks)
    return Base(key_of(transformer.sha256()), marks)


def base_key(transformer: Part, base: Base) -> str:
    """Names weights and config, for the header of an export."""
    return key_of({"weights": base.sha256, "config": transformer.settings})


def identity_of(run: Run, base: Base) -> dict[str, Json]:
    """What a resumed run must share with the run that made its checkpoints."""
    config = run.config
    settings = config.train.model_dump(mode="json")
    settings["lora_target_modules"].sort()  # in whatever order, they are the same adapter
    return {
        "view": run.view.hash,
        ORDER: "all" if run.windows is None else run.windows.name,
        **{f"train.{name}": settings[name] for name in FIXED_FIELDS},
        "train.initial_adapter.sha256": _sha256_of_adapter(config.train.initial_adapter),
        "train.mixed_precision": str(run.transformer.dtype).removeprefix("torch."),
        "memory.base_precision": config.memory.base_precision,
        "model.drop_learned_positions": config.model.drop_learned_positions,
        "transformer.config": run.base.settings,
        "transformer.weights": base.sha256,
    }


def _sha256_of_adapter(path: Path | None) -> str | None:
    return None if path is None else sha256_file(adapter_file(path))


def refuse_another_run(state: Mapping[str, Any], identity: Mapping[str, Json], where: str) -> None:
    """Raises `CacheError` naming what differs between the checkpoint's run and this one."""
    shown = [f"{name} was {old!r}, is {new!r}" for name, old, new in differences(state["identity"], identity)]
    if shown:
        raise CacheError(
            f"{where}: made by another run ({', '.join(shown)}); choose another train.output_dir to start anew"
        )


def differences(left: Mapping[str, Json], right: Mapping[str, Json]) -> Iterator[tuple[str, Json, Json]]:
    """Dotted names whose values differ, with both; None is a value that is not there."""
    for name in sorted(left.keys() | right.keys()):
        one, other = left.get(name), right.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from ((f"{name}.{inner}", here, there) for inner, here, there in differences(one, other))
        elif one != other:
            yield name, one, other
