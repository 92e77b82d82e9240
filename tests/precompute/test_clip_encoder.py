"""Copies beside the encoder on an emulated GPU: the stored bits are the plain ones under every schedule."""

from collections import deque
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from precompute import clip_encoder, latents
from precompute.clip_encoder import ClipEncoder, Launched
from precompute.encoders import VaeEncoder
from shared.config import Model, Precompute
from shared.host_memory import HostAllocator, host_empty
from shared.media.child import Decoded
from shared.model.geometry import Bucket
from shared.model.pretrained import pretrained_part
from tests.corpus import config_for, run, stored_files, write_corpus
from tests.emulated_device import SCHEDULES, EmulatedGpu, Mutant

CPU = torch.device("cpu")
BUCKET = Bucket(5, 16, 32)
KEYS = [f"{number:032x}" for number in range(8)]
Results = list[dict[str, np.ndarray]]


@cache
def encoder(pipeline: Path) -> VaeEncoder:
    part = pretrained_part(Model(pretrained_model_name_or_path=str(pipeline)), "vae")
    return VaeEncoder(part, Precompute(cache="unused", vae_dtype="fp32"), CPU)


def encode(pipeline: Path, allocate: HostAllocator | None = None, *, images: bool = False) -> Results:
    """Return the results of four batches of two clips, as stage 1 takes them."""
    conventions = SimpleNamespace(image_to_video=images, out_channels=16)
    stage: Any = SimpleNamespace(
        config=SimpleNamespace(precompute=SimpleNamespace(noised_image_count=2)),
        encoders=SimpleNamespace(conventions=conventions),
    )
    window = SimpleNamespace(bucket=BUCKET, flip=True, timestamps_us=(0,))
    clips: Any = {key: SimpleNamespace(window=window, probe=SimpleNamespace(sha256="")) for key in KEYS}
    clip_encoder, draws = ClipEncoder(stage, clips, encoder(pipeline), allocate), np.random.default_rng(0)
    under_way, found = deque[Launched](), Results()
    for number in range(0, len(KEYS), 2):
        decoded = {
            key: Decoded(draws.uniform(0, 255, (5, 16, 32, 3)).astype(np.float32 if number else np.uint8), "pyav")
            for key in KEYS[number : number + 2]
        }
        under_way.append(clip_encoder.launch(decoded))
        while len(under_way) > (clip_encoder.num_under_way if number < len(KEYS) - 2 else 0):
            for sample in under_way.popleft().samples():
                found.append({name: tensor.numpy().copy() for name, tensor in sample.tensors.items()})
    return found


def num_wrong(gpu: EmulatedGpu, pipeline: Path, *, images: bool = False) -> int:
    """Return how many results on the emulated GPU differ from the plain ones by any bit."""
    plain = encode(pipeline, images=images)
    with gpu.emulate():
        found = encode(pipeline, gpu.allocate, images=images)
    assert len(gpu.streams) == 3 and len(found) == len(plain) == len(KEYS)
    return sum(
        not np.array_equal(one[name], other[name]) for one, other in zip(found, plain, strict=True) for name in other
    )


COPIES_WAIT = "        self._copies_in.compute_waits(self._copies_in.record())\n"
COPY_IN = "        with self._copies_in.beside_compute():\n"
COPY_OUT = "        with self._copies_out.after_compute():\n"
MUTANTS = [
    Mutant(clip_encoder, "the computation does not wait for the frames", [(COPIES_WAIT, "")]),
    Mutant(clip_encoder, "it waits before they are copied", [(COPIES_WAIT, ""), (COPY_IN, COPIES_WAIT + COPY_IN)]),
    Mutant(clip_encoder, "results are copied at once", [(COPY_OUT, COPY_OUT.replace("after", "beside"))]),
    Mutant(
        clip_encoder, "the host does not wait", [("            self.written.synchronize()\n", "            pass\n")]
    ),
    Mutant(clip_encoder, "the wrong stream is waited for", [("self._copies_out.record()", "self._copies_in.record()")]),
    Mutant(clip_encoder, "nothing holds what is read", [("(frames, noises, tensors))", "None)")]),
]


@pytest.mark.parametrize("schedule", [*SCHEDULES][:5])
def test_copies_beside_the_encoder_give_the_plain_bits(schedule: str, pipeline: Path) -> None:
    assert num_wrong(EmulatedGpu(SCHEDULES[schedule]), pipeline) == 0


def test_images_come_beside_the_encoder_too(pipeline: Path) -> None:
    assert num_wrong(EmulatedGpu(min), pipeline, images=True) == 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_every_mutant_is_caught(mutant: Mutant, pipeline: Path, tmp_path: Path) -> None:
    with mutant.installed(tmp_path):
        assert any(num_wrong(EmulatedGpu(choose), pipeline) > 0 for choose in SCHEDULES.values())


def test_a_batch_that_is_collected_late_gives_the_same_cache(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_corpus(tmp_path / "clips", 7)
    run(config_for(pipeline, root, tmp_path / "at once"))
    monkeypatch.setattr(latents, "ClipEncoder", partial(ClipEncoder, allocate=host_empty))
    run(config_for(pipeline, root, tmp_path / "late"))
    assert stored_files(tmp_path / "late") == stored_files(tmp_path / "at once")
