"""`precog doctor` on healthy experiments, and on ones with a fault that a user can really have."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor
from typer.testing import CliRunner

import precog
from shared import seeding
from shared.cache.collection import Collection
from shared.cache.shard import Sample, write_shard
from shared.cache.storage import LocalStorage
from shared.cache.view import View, ViewRow
from shared.config import Config, save_config
from shared.errors import CacheError, PrecogError, UsageError
from shared.fingerprint import key_of
from tests.experiments import CAPTIONS, fill_cache, write_experiment
from tests.tiny import TEXT_LENGTH, TEXT_WIDTH, build_text_encoder, build_transformer, build_vae
from train.data.conditioning import image_condition
from train.data.example import ModelInput
from train.doctor import Diagnosis, Subject, examine
from train.measure import Measured, measure
from train.objective import add_noise, velocity
from train.transformer.forward import predict

HEALTHY = ("2b", "5b", "5b-i2v", "1.5-5b-i2v")
Experiment = Callable[[str], tuple[Path, Config]]
Plant = Callable[[Path, Config], Config]
logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Precomputed experiments, one of a kind."""
    folders = {}
    for variant in HEALTHY:
        folders[variant] = tmp_path_factory.mktemp(variant.replace(".", "_"))
        fill_cache(write_experiment(variant, folders[variant]))
    return folders


@pytest.fixture
def experiment(originals: dict[str, Path], tmp_path: Path) -> Experiment:
    """A copy to break."""

    def copy(variant: str) -> tuple[Path, Config]:
        folder = tmp_path / variant
        shutil.copytree(originals[variant], folder)
        return folder, write_experiment(variant, folder)

    return copy


@pytest.mark.parametrize("variant", HEALTHY)
def test_healthy_experiment_has_conventions_and_shapes_and_no_findings(variant: str, experiment: Experiment) -> None:
    _, config = experiment(variant)
    diagnosis, subject = examine(config)
    assert (diagnosis.errors, diagnosis.warnings) == ([], [])
    assert subject is not None
    facts = dict(diagnosis.facts)
    assert facts["model"] == subject.conventions.name
    assert facts["clips"] == "2 train, 0 held_out, 0 skipped"
    expected = {
        "2b": "input 3x16x8x12, text 16x32, target 3x16x8x12",
        "5b": "input 3x16x8x12, text 16x32, target 3x16x8x12",
        "5b-i2v": "input 3x32x8x12, text 16x32, target 3x16x8x12",
        "1.5-5b-i2v": "input 4x32x8x12, text 16x32, target 4x16x8x12",
    }
    assert facts["train 9x64x96"] == expected[variant]
    assert ("image latents" in facts) == variant.endswith("i2v")
    if variant == "1.5-5b-i2v":
        assert facts["image latents"] == "posterior x 1.42857, frame 0 of the padded clip"
        assert facts["padding"] == "copies in front, to a multiple of 2 latent frames"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), "utf-8")


def with_fields(config: Config, table: str, **changes: object) -> Config:
    return config.model_copy(update={table: getattr(config, table).model_copy(update=changes)})


def only_shard(folder: Path, kind: str) -> Path:
    (shard,) = (folder / "cache" / kind).rglob("*.tar")
    return shard


def other_scaling_factor(folder: Path, config: Config) -> Config:
    edit(folder / "model/vae/config.json", scaling_factor=1.15258426)
    return config


def other_text_length(folder: Path, config: Config) -> Config:
    edit(folder / "model/transformer/config.json", max_text_seq_length=20)
    return config


def more_frames(folder: Path, config: Config) -> Config:
    return with_fields(config, "data", frame_buckets=(9, 33), max_num_frames=33)


def another_vae(folder: Path, config: Config) -> Config:
    build_vae("5b", seed=1).save_pretrained(folder / "model/vae")
    return config


def another_t5(folder: Path, config: Config) -> Config:
    build_text_encoder(seed=1).save_pretrained(folder / "model/text_encoder")
    return config


def another_tokenizer(folder: Path, config: Config) -> Config:
    file = next(path for path in sorted((folder / "model/tokenizer").iterdir()) if path.name == "tokenizer.json")
    file.write_bytes(file.read_bytes() + b"\n")
    return config


def image_transformer(folder: Path, config: Config) -> Config:
    build_transformer("5b-i2v").save_pretrained(folder / "model/transformer")
    return config


def missing_transformer_shard(folder: Path, config: Config) -> Config:
    transformer = folder / "model/transformer"
    shutil.rmtree(transformer)
    build_transformer("5b").save_pretrained(transformer, max_shard_size="100KB")
    next(transformer.glob("*-00002-of-*")).unlink()
    return config


def pickled_transformer(folder: Path, config: Config) -> Config:
    weights = folder / "model/transformer/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    return config


def torn_transformer(folder: Path, config: Config) -> Config:
    weights = folder / "model/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return config


def epsilon_scheduler(folder: Path, config: Config) -> Config:
    edit(folder / "model/scheduler/scheduler_config.json", prediction_type="epsilon")
    return config


def truncated_shard(folder: Path, config: Config) -> Config:
    shard = only_shard(folder, "latents")
    shard.write_bytes(shard.read_bytes()[:-512])
    return config


def missing_shard(folder: Path, config: Config) -> Config:
    only_shard(folder, "prompts").unlink()
    return config


def lost_receipt(folder: Path, config: Config) -> Config:
    only_shard(folder, "latents").with_suffix(".json").unlink()
    return config


def flipped_bit(folder: Path, config: Config) -> Config:
    shard = only_shard(folder, "latents")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return config


def no_view(folder: Path, config: Config) -> Config:
    return with_fields(config, "data", name="elsewhere")


def no_transformer(folder: Path, config: Config) -> Config:
    shutil.rmtree(folder / "model/transformer")
    return config


FAULTS: list[tuple[Plant, str, type[PrecogError], str]] = [
    (other_scaling_factor, "5b", CacheError, r"another VAE than .*model/vae: scaling_factor was 0.7, is 1.15258426"),
    (other_text_length, "5b", CacheError, "prompts were encoded with 16 tokens, the transformer takes 20"),
    (more_frames, "5b-i2v", UsageError, "33x64x96: the learned position table of this checkpoint covers only 9x64x96"),
    (another_vae, "5b", CacheError, r"another VAE than .*model/vae: the weights differ"),
    (another_t5, "5b", CacheError, r"another T5 than .*model/text_encoder: the weights differ"),
    (another_tokenizer, "5b", CacheError, r"another tokenizer than .*model/tokenizer: tokenizer.json differs"),
    (image_transformer, "5b", CacheError, "made for text-to-video, without the first frames"),
    (missing_transformer_shard, "5b", UsageError, r"names weight files that are not there: .*-00002-of-"),
    (pickled_transformer, "5b", UsageError, r"only pickled weights \(diffusion_pytorch_model.bin\), which are never"),
    (torn_transformer, "5b", UsageError, r"diffusion_pytorch_model.safetensors: not a whole safetensors file"),
    (epsilon_scheduler, "5b", UsageError, "scheduler predicts 'epsilon'; CogVideoX is trained on 'v_prediction'"),
    (truncated_shard, "5b", CacheError, r"\.tar: has \d+ bytes where its receipt says \d+"),
    (missing_shard, "5b", CacheError, r"prompts/.*\.tar: is missing"),
    (lost_receipt, "5b", CacheError, r"sample [0-9a-f]{32} is not stored; run `precog precompute`"),
    (flipped_bit, "5b", CacheError, r"sample [0-9a-f]{32} is damaged; `precog cache verify --repair`"),
    (no_view, "5b", CacheError, "datasets/elsewhere: no such view; run `precog precompute`"),
    (no_transformer, "5b", UsageError, "has no transformer/ folder"),
]


@pytest.mark.parametrize(("plant", "variant", "kind", "line"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_planted_fault_is_found(
    plant: Plant, variant: str, kind: type[PrecogError], line: str, experiment: Experiment
) -> None:
    diagnosis, _ = examine(plant(*experiment(variant)))
    messages = [str(error) for error in diagnosis.errors]
    assert diagnosis.warnings == []
    assert len(set(messages)) == len(messages), "the same finding twice"
    (found,) = [error for error in diagnosis.errors if matches(line, str(error))]
    assert type(found) is kind
    assert all("\n" not in message for message in messages)
    assert type(diagnosis.errors[0]) is kind, "the exit code is the first error's"


def matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


@pytest.mark.parametrize(("published", "asked"), [("bfloat16", "fp16"), ("float16", "bf16")])
def test_other_half_precision_than_the_published_one_is_warned_of(
    published: str, asked: str, experiment: Experiment
) -> None:
    folder, config = experiment("5b")
    build_transformer("5b", getattr(torch, published)).save_pretrained(folder / "model/transformer")
    diagnosis, _ = examine(with_fields(config, "train", mixed_precision=asked))
    assert diagnosis.errors == []
    (warning,) = diagnosis.warnings
    name = {"bfloat16": "bf16", "float16": "fp16"}[published]
    assert f"train.mixed_precision = '{asked}'" in warning and f"is published in {name}" in warning
    for right in ("auto", name, "fp32"):
        assert examine(with_fields(config, "train", mixed_precision=right))[0].warnings == []


def test_captions_beyond_the_text_length_are_counted(experiment: Experiment) -> None:
    folder, config = experiment("5b")
    (folder / "clips/1.txt").write_text(" ".join(CAPTIONS * 4), "utf-8")
    fill_cache(config)
    (warning,) = examine(config)[0].warnings
    assert matches(
        r"captions of 1 of 2 clips are longer than the text length .* \d+ tokens \(1.mp4 at 0.00 s\)", warning
    )


def test_schedule_that_keeps_signal_is_warned_of(experiment: Experiment) -> None:
    folder, config = experiment("5b")
    edit(folder / "model/scheduler/scheduler_config.json", rescale_betas_zero_snr=False)
    diagnosis, _ = examine(config)
    assert diagnosis.errors == []
    (schedule,) = diagnosis.warnings
    assert "rescale_betas_zero_snr is false" in schedule


def test_view_of_other_settings_and_prompt_that_is_not_encoded_are_wrong(experiment: Experiment) -> None:
    _, config = experiment("5b")
    config = with_fields(config, "data", validation_prompts=("a dog",), fps=4.0)
    diagnosis, _ = examine(config)
    settings, prompt = diagnosis.errors
    assert "data.fps was 0.0, is 4.0" in str(settings)
    assert "'a dog' is not in it" in str(prompt)
    assert [error.exit_code for error in diagnosis.errors] == [4, 4]


def scenes() -> list[Tensor]:
    """Eight clips [F,C,H,W] of three latent frames that move, each from an image of its own."""
    images = [seeding.normal((16, 8, 12), "scene", number) for number in range(8)]
    return [torch.stack([image.roll(2 * frame, dims=-1) for frame in range(3)]) for image in images]


def stage_scenes(folder: Path, subject: Subject) -> Subject:
    """The subject with a cache of the scenes, all under one empty prompt: only the image tells them apart."""
    storage = LocalStorage(str(folder / "scenes"))
    latents, prompts = Collection("latents", key_of("latents")), Collection("prompts", key_of("prompts"))
    scaling_factor, text = subject.conventions.scaling_factor, key_of("text")
    rows, samples = [], []
    for number, clip in enumerate(scenes()):
        mean = clip.transpose(0, 1) / scaling_factor
        tensors = {"moments": mean, "image_moments": mean[:, :1]}
        tensors = {name: torch.cat([value, torch.full_like(value, -30)]) for name, value in tensors.items()}
        tensors["image_moments"] = tensors["image_moments"][None]
        samples.append(Sample(key_of(number), tensors, {}))
        captions = ("",), (1.0,), (text,), (0,)
        rows.append(ViewRow(f"{number}.mp4", 0, 1, 9, 64, 96, False, key_of(number), *captions, "train", ""))
    write_shard(storage, f"{latents.folder}/9x64x96", samples)
    write_shard(storage, prompts.folder, [Sample(text, {"prompt_embeds": torch.zeros(TEXT_LENGTH, TEXT_WIDTH)}, {})])
    view = View("scenes", latents, prompts, {"": text}, tuple(rows))
    return replace(subject, cache=replace(subject.cache, storage=storage, view=view))


def teach(subject: Subject, folder: Path, *, image_scale: float, padding_in_front: bool) -> None:
    """Train all weights of the base model on the scenes, padded and scaled as some trainer would."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder)
    optimizer = torch.optim.Adam(transformer.parameters(), lr=1e-2)
    conventions = replace(subject.conventions, image_scaling_factor=image_scale)
    clips = scenes()
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        inputs, targets = [], []
        for clip in clips[step % 2 :: 2]:
            latents = torch.cat([clip[:1], clip] if padding_in_front else [clip, clip[-1:]])
            noise = torch.randn(latents.shape, generator=generator)
            timestep = torch.randint(1000, (), generator=generator)
            noisy = add_noise(latents, noise, timestep, subject.schedule)
            condition = image_condition(clip[:1] / conventions.scaling_factor, 4, conventions)
            embeds = torch.zeros(TEXT_LENGTH, TEXT_WIDTH)
            inputs.append(ModelInput(torch.cat([noisy, condition], dim=1), embeds, timestep))
            targets.append(velocity(latents, noise, timestep, subject.schedule))
        predictions = torch.stack(predict(transformer, inputs, conventions))
        torch.autograd.backward((predictions - torch.stack(targets)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    transformer.save_pretrained(folder)


@pytest.mark.parametrize("padding_in_front", [True, False], ids=["padded in front", "padded at the end"])
def test_measurement_finds_what_the_base_model_was_trained_with(padding_in_front: bool, experiment: Experiment) -> None:
    folder, config = experiment("1.5-5b-i2v")
    opened = examine(config)[1]
    assert opened is not None
    subject = stage_scenes(folder, opened)
    teach(subject, folder / "model/transformer", image_scale=1 / 0.7, padding_in_front=padding_in_front)
    measured = measure(subject)
    assert measured is not None
    logger.info("%s, %s", measured.means, measured.warning)
    assert len(measured.means) == 6
    right = "image latents x 1.42857, padding in front"
    assert measured.configured == right
    if padding_in_front:
        assert measured.warning is None
        lost_flag = Measured("image latents x 0.7, padding in front", measured.losses)  # no invert_scale_latents
        assert lost_flag.warning is not None and f"lower with {right} than with image" in lost_flag.warning
    else:
        best = "image latents x 1.42857, padding at the end"
        assert measured.warning is not None and f"lower with {best} than with {right}" in measured.warning


def test_configured_scale_follows_the_flag_of_the_vae(experiment: Experiment) -> None:
    folder, config = experiment("1.5-5b-i2v")
    edit(folder / "model/vae/config.json", invert_scale_latents=False)
    fill_cache(config)
    subject = examine(config)[1]
    assert subject is not None
    measured = measure(subject)
    assert measured is not None and measured.configured == "image latents x 0.7, padding in front"


def test_measurement_asks_only_what_the_checkpoint_leaves_open(experiment: Experiment) -> None:
    _, config = experiment("5b")
    subject = examine(config)[1]
    assert subject is not None
    assert measure(subject) is None
    _, config = experiment("5b-i2v")
    subject = examine(config)[1]
    assert subject is not None
    measured = measure(subject)
    assert measured is not None
    assert list(measured.means) == ["image latents x 0.7", "image latents x 1", "image latents x 1.42857"]
    assert measured.configured == "image latents x 0.7"


def test_lower_loss_of_another_candidate_is_told_with_its_margin_unless_it_is_chance() -> None:
    question = Measured("front", {"front": (1.0, 2.0, 3.0), "end": (0.9, 1.7, 2.8)})
    assert question.warning is not None
    assert "10.0% lower with end than with front" in question.warning
    assert "3.5 standard errors over 3 draws" in question.warning
    assert Measured("end", question.losses).warning is None
    assert Measured("front", {"front": (1.0, 2.0, 3.0), "end": (1.3, 1.5, 2.9)}).warning is None


def run_doctor(config: Config, folder: Path, *options: str) -> Any:
    save_config(config, folder / "experiment.toml")
    return CliRunner().invoke(precog.app, ["doctor", str(folder / "experiment.toml"), *options])


def test_command_ends_with_the_code_of_what_is_wrong(experiment: Experiment) -> None:
    folder, config = experiment("1.5-5b-i2v")
    result = run_doctor(config, folder, "--json", "--measure")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["errors"] == [] and len(report["measured"]) == 6
    assert report["facts"]["model"] == "CogVideoX 1.5 I2V, sliced RoPE positions"
    assert run_doctor(another_vae(folder, config), folder).exit_code == 4
    assert run_doctor(epsilon_scheduler(folder, config), folder).exit_code == 2
    assert run_doctor(config, folder, "train.lora_rnak=3").exit_code == 2


def test_everything_wrong_is_told_at_once(experiment: Experiment) -> None:
    folder, config = experiment("5b")
    for plant in (another_vae, another_t5, pickled_transformer, truncated_shard):
        config = plant(folder, config)
    diagnosis: Diagnosis = examine(config)[0]
    assert len(diagnosis.errors) == 4
    assert [error.exit_code for error in diagnosis.errors] == [2, 4, 4, 4]
