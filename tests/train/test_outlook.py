"""`precog memory`: what each plan would cost on a card that is not there."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from precog import app
from shared.config import save_config
from tests.experiments import fill_cache, write_experiment
from train.memory import PREFERENCE


def ask(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["memory", str(folder / "memory.toml"), *arguments])


def test_each_plan_has_a_line_and_the_card_decides_what_fits(tmp_path: Path) -> None:
    config = write_experiment("5b", tmp_path, lora_rank=4)
    save_config(config, tmp_path / "memory.toml")
    before = ask(tmp_path, "--json")
    assert before.exit_code == 0, before.stderr
    assert "simulated" in before.stderr and "largest bucket of the config" in before.stderr
    plans = json.loads(before.stdout)["simulated_gib"]
    assert len(plans) == len(PREFERENCE)
    sizes = [plan["reserved"] for plan in plans]
    assert sizes == sorted(sizes, reverse=True)
    fill_cache(config)
    between = (sizes[0] + sizes[1]) / 2
    after = ask(tmp_path, "--json", "--card-gib", f"{between}")
    assert f"largest clip of view {config.data.name}" in after.stderr
    fits = [plan["fits"] for plan in json.loads(after.stdout)["simulated_gib"]]
    assert not fits[0] and fits[-1]
    assert "would take: activations attention_output" in after.stderr
    assert "no plan fits in 0 GiB" in ask(tmp_path, "--card-gib", "0").stderr


def test_a_field_that_is_set_leaves_the_plans_with_it(tmp_path: Path) -> None:
    save_config(write_experiment("2b", tmp_path, lora_rank=4), tmp_path / "memory.toml")
    result = ask(tmp_path, "memory.activations=block_input", "--json")
    assert {plan["plan"].split(",")[0].split(" in ")[0] for plan in json.loads(result.stdout)["simulated_gib"]} == {
        "activations block_input"
    }
    refused = ask(tmp_path, "train.transformer_engine=reference")
    assert refused.exit_code == 2 and "'reference' has no plans" in refused.stderr
