"""Tests of `precog plan --card`: memory by plan, exact FLOPs, and times against published figures."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from precog import app
from shared.cards import find_card
from shared.config import Config
from shared.config_file import save_config
from shared.errors import UsageError
from tests.experiments import changed, fill_cache, write_experiment
from train.memory.choice import PREFERENCE
from train.memory.cost import (
    CONTEXT_GIB,
    EFFICIENCY,
    SECONDS_BAND,
    block_flops,
    training_cost,
)
from train.transformer.engine import Activations


def ask(config: Config, folder: Path, *arguments: str) -> Result:
    save_config(config, folder / "plan.toml")
    return CliRunner().invoke(app, ["plan", str(folder / "plan.toml"), *arguments])


def training(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["train"]


def test_each_plan_has_a_line_and_the_card_decides_what_fits(tmp_path: Path) -> None:
    config = write_experiment("5b", tmp_path, lora_rank=4)
    before = ask(config, tmp_path, "--card", "24GiB", "--json")
    found = training(before)
    assert json.loads(before.stdout)["latents"] == {"planned": 2, "reused": 0}, "stage 1 is planned as without --card"
    assert "simulated" in before.stderr and "largest bucket of the config" in before.stderr
    assert len(found["plans"]) == len(PREFERENCE) and found["takes"] == found["plans"][0]["plan"]
    sizes = [plan["reserved_gib"] for plan in found["plans"]]
    assert sizes == sorted(sizes, reverse=True)
    fill_cache(config)
    between = CONTEXT_GIB + (sizes[0] + sizes[1]) / 2
    after = ask(config, tmp_path, "--json", "--card", f"{between:.9f}GiB")
    assert f"largest clip of view {config.data.name}" in after.stderr
    fits = [plan["fits"] for plan in training(after)["plans"]]
    assert not fits[0] and fits[-1]
    assert "would take: activations attention_output" in after.stderr


@pytest.mark.parametrize(("text", "name"), [("4090", "RTX 4090"), ("rtx-3060", "RTX 3060"), ("7.5 gib", "7.5 GiB")])
def test_a_card_is_found_by_its_name_or_its_memory(text: str, name: str) -> None:
    assert find_card(text).name == name
    for wrong, hint in (("4095", "did you mean 4090"), ("24", "write another card's memory as 24GiB")):
        with pytest.raises(UsageError, match=rf"--card '{wrong}': unknown card; .*{hint}"):
            find_card(wrong)


def test_time_is_that_of_the_mean_clip_and_of_the_whole_run(tmp_path: Path) -> None:
    values = {"global_batch_size": 3, "max_train_steps": 100, "mixed_precision": "bf16"}
    config = write_experiment("5b", tmp_path, lora_rank=4, **values)
    one_plan = {"activations": "full", "offload_activations": False, "stream_weights": 0}
    config = changed(config, memory=one_plan)
    cost = training_cost(config, find_card("H100"))
    flops = 3 * 2 * block_flops(64, 16 + 3 * 4 * 6, "full")
    seconds, hours = cost.plans[0].seconds_per_step, cost.plans[0].hours
    assert seconds is not None and hours is not None
    expected = [bound * flops / (989.4e12 * EFFICIENCY) for bound in SECONDS_BAND]
    assert seconds == pytest.approx(expected) and hours == pytest.approx([100 * bound / 3600 for bound in expected])
    fp32 = changed(config, train={"mixed_precision": "fp32"})
    for other, card in ((config, "80GiB"), (fp32, "h100")):
        assert {plan.seconds_per_step for plan in training_cost(other, find_card(card)).plans} == {None}


def test_a_view_that_the_base_cannot_train_is_refused(tmp_path: Path) -> None:
    config = write_experiment("1.5-5b", tmp_path, lora_rank=4)
    fill_cache(config)
    shape = Path(config.model.pretrained_model_name_or_path, "transformer", "config.json")
    shape.write_text(json.dumps(json.loads(shape.read_bytes()) | {"sample_height": 4}), "utf-8")
    with pytest.raises(UsageError, match=r"view two: 9x64x96: the position grid .* ends at 32x2400 pixels"):
        training_cost(config, find_card("4090"))


@pytest.mark.parametrize(
    ("width", "depth", "tokens", "full", "recomputing"),
    [(1920, 30, 17_776, 349, 381), (3072, 42, 17_776, 909, 1022), (3072, 42, 45_104, 4533, 4819)],
    ids=["2b", "5b", "1.5-5b"],
)
def test_flops_of_the_published_sizes(width: int, depth: int, tokens: int, full: int, recomputing: int) -> None:
    levels: tuple[Activations, ...] = ("full", "attention_output")
    found = [depth * block_flops(width, tokens, level) / 1e12 for level in levels]
    assert found == pytest.approx([full, recomputing], rel=0.01)
