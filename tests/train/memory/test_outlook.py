"""`precog plan --card`: what each plan of training would cost on a card that is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from precog import app
from shared.config import Config, save_config
from shared.errors import UsageError
from tests.experiments import fill_cache, write_experiment
from tests.train.memory.published import published
from train.memory.choice import GIB, PREFERENCE, RESERVED_PER_ALLOCATED
from train.memory.outlook import CONTEXT_GIB, Outlook, find_card, foresee
from train.memory.pace import CARDS, Shape, pack_seconds


def ask(config: Config, folder: Path, *arguments: str) -> Result:
    save_config(config, folder / "plan.toml")
    return CliRunner().invoke(app, ["plan", str(folder / "plan.toml"), *arguments])


def training(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["train"]


def test_each_plan_has_a_line_and_the_card_decides_what_fits(tmp_path: Path) -> None:
    config = write_experiment("5b", tmp_path, lora_rank=4)
    before = ask(config, tmp_path, "--card", "24", "--json")
    found = training(before)
    assert json.loads(before.stdout)["latents"] == {"planned": 2, "reused": 0}, "stage 1 is told as without --card"
    assert "simulated" in before.stderr and "largest bucket of the config" in before.stderr
    assert len(found["plans"]) == len(PREFERENCE) and found["takes"] == found["plans"][0]["plan"]
    sizes = [plan["simulated_gib"]["reserved"] for plan in found["plans"]]
    assert sizes == sorted(sizes, reverse=True)
    fill_cache(config)
    between = CONTEXT_GIB + (sizes[0] + sizes[1]) / 2
    after = ask(config, tmp_path, "--json", "--card", f"{between}")
    assert f"largest clip of view {config.data.name}" in after.stderr
    fits = [plan["fits"] for plan in training(after)["plans"]]
    assert not fits[0] and fits[-1]
    assert "would take: activations attention_output" in after.stderr
    assert "no plan fits in 0.1 GiB; try memory.base_precision" in ask(config, tmp_path, "--card", "0.1").stderr


def test_a_field_that_is_set_leaves_the_plans_with_it(tmp_path: Path) -> None:
    config = write_experiment("2b", tmp_path, lora_rank=4)
    found = training(ask(config, tmp_path, "memory.activations=block_input", "--card=24", "--json"))
    assert {plan["plan"].split(",")[0].split(" in ")[0] for plan in found["plans"]} == {"activations block_input"}
    refused = ask(config, tmp_path, "train.transformer_engine=reference", "--card=24")
    assert refused.exit_code == 2 and "'reference' has no plans" in refused.stderr


def test_without_a_card_nothing_is_said_of_training(tmp_path: Path) -> None:
    result = ask(write_experiment("2b", tmp_path, lora_rank=4), tmp_path, "--json")
    assert training(result) is None and "Training on" not in result.stderr


def test_training_is_foreseen_before_there_are_clips_and_their_absence_is_the_last_line(tmp_path: Path) -> None:
    config = write_experiment("2b", tmp_path, lora_rank=4)
    result = ask(config, tmp_path, "--card=h100", "--json", f"data.instance_data_root={tmp_path}/none")
    assert result.exit_code == 3 and not result.stdout
    assert "Training on H100" in result.stderr and "none' is not a folder" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("card", ["h200", "0", "-1", "nan", "inf", "x"])
def test_a_card_that_is_none_is_one_line(card: str, tmp_path: Path) -> None:
    result = ask(write_experiment("2b", tmp_path, lora_rank=4), tmp_path, f"--card={card}")
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("precog: ")]
    assert f"--card {card!r}: one of h100, a100, 4090, or its memory in GiB" in line


def test_seconds_are_those_of_a_step_of_the_largest_clips_on_a_card_that_is_known(tmp_path: Path) -> None:
    values = {"global_batch_size": 3, "max_tokens_per_pack": 1, "mixed_precision": "bf16"}
    config = write_experiment("5b", tmp_path, lora_rank=4, **values)
    outlook = foresee(config, find_card("H100"))
    tokens = 16 + 3 * 4 * 6
    shape = Shape(64, 2, (tokens,), 8 * 4 * 64)
    for costs in outlook.costs:
        assert costs.plan.compile, "the card's machine compiles"
        expected = pack_seconds(CARDS["h100"], costs.plan, shape)
        assert costs.seconds is not None and expected is not None
        assert costs.seconds == pytest.approx(3 * expected), "three packs of one clip"
    assert outlook.work.startswith("3 x 9x64x96 a step")
    for changed, card in ((config, find_card("80")), (in_fp32(config), find_card("h100"))):
        assert [costs.seconds for costs in foresee(changed, card).costs] == [None] * len(PREFERENCE)


def in_fp32(config: Config) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": "fp32"})})


def test_previews_count(tmp_path: Path) -> None:
    config = write_experiment("2b", tmp_path, lora_rank=4, preview_steps=5)
    sample = config.sample.model_copy(update={"num_frames": 49, "height": 160, "width": 240})
    config = config.model_copy(update={"sample": sample})
    (*_, lean) = foresee(config, find_card("24")).costs
    assert lean.memory.needed == lean.memory.preview > lean.memory.peak
    assert lean.reserved_gib == lean.memory.preview * RESERVED_PER_ALLOCATED / GIB


def test_a_view_that_this_base_cannot_train_is_one_line(tmp_path: Path) -> None:
    config = write_experiment("5b-i2v", tmp_path, lora_rank=4)
    data = config.data.model_copy(update={"resolution_buckets": ((32, 48),)})
    model = config.model.model_copy(update={"drop_learned_positions": True})
    config = config.model_copy(update={"data": data})
    fill_cache(config.model_copy(update={"model": model}))
    with pytest.raises(UsageError, match=r"view two: .*drop_learned_positions"):
        foresee(config, find_card("24"))


@pytest.mark.faults  # ten seconds: the largest models, in every plan
@pytest.mark.parametrize(
    ("card", "taken", "seconds"),
    [("h100", "full, compiled", 2.1), ("4090", "attention_output, modulation by timestep, compiled", 8.0)],
)
def test_the_published_5b_on_published_cards(card: str, taken: str, seconds: float, tmp_path: Path) -> None:
    """At rank 64, 49x480x720: without recomputing on an H100, but for attention with it on a 4090."""
    config = write_experiment("5b", tmp_path, lora_rank=64, mixed_precision="bf16", global_batch_size=1)
    data = {"frame_buckets": (49,), "max_num_frames": 49, "resolution_buckets": ((480, 720),)}
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    real = published("5b")
    (tmp_path / "model" / "transformer" / "config.json").write_text(json.dumps(real))
    outlook: Outlook = foresee(config, find_card(card))
    assert outlook.taken is not None and outlook.as_json()["takes"] == f"activations {taken}"
    assert outlook.taken.seconds == pytest.approx(seconds, rel=0.05)
