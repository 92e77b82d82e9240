"""`precog plan`: its figures are those of the next run, and nothing is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bench.shards import write_shard
from precompute import recipes
from precompute.discover import open_stage
from precompute.estimate import Estimate, estimate, recipe_changes
from shared.cache.collection import collection_for, write_recipe
from shared.cache.storage import LocalStorage
from shared.cache.view import read_view
from shared.config import Config, fields_shaping
from shared.errors import UsageError
from shared.media.pool import decode_pool
from shared.sources.rows import read_sources
from tests.corpus import config_for, run, stored_files, write_captions, write_corpus, write_video

Filled = tuple[Path, Path]


def look(config: Config) -> Estimate:
    with decode_pool(config.precompute) as pool:
        return estimate(open_stage(config), pool)


def test_plan_is_what_the_run_does_and_writes_nothing(pipeline: Path, tmp_path: Path) -> None:
    root, cache = write_corpus(tmp_path / "clips", 6), tmp_path / "cache"
    (root / "003.mp4").write_bytes(b"no video")
    config = config_for(pipeline, root, cache)
    planned = look(config)
    assert not cache.exists()
    report = run(config)
    assert (planned.clips, planned.latents.made, planned.latents.reused) == (5, report.latents.made, 0)
    assert (planned.prompts.made, planned.prompts.reused) == (report.prompts.made, 0)
    assert planned.skipped == report.skipped and planned.new == 5 and planned.changed == []
    assert planned.shards == {"latents": 2, "prompts": 1}
    stored = sum(len(content) for name, content in stored_files(cache).items() if not name.startswith("datasets"))
    needed = planned.bytes["needed"]
    assert (
        needed is not None and stored - 5000 < needed < 2 * stored
    )  # all but the recipes; small samples are mostly padding
    again = look(config)
    assert (again.latents.made, again.latents.reused, again.bytes["needed"], again.new) == (0, 5, 0, 0)
    assert again.orphaned == {"latents": 0, "prompts": 0, "bytes": 0}
    assert again.bytes["stored"] == sum(path.stat().st_size for path in cache.rglob("*.tar"))
    body = json.loads(json.dumps(again.as_json()))
    assert body["latents"] == {"planned": 0, "reused": 5} and body["prompts"] == {"planned": 0, "reused": 8}
    assert body["clips"] == 5 and body["seconds"]["total"] > 0 and body["bytes"]["free"] > 0


def test_file_with_a_transient_failure_is_a_warning(
    pipeline: Path, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = filled
    config = config_for(pipeline, root, cache)
    sources = read_sources(config.data)
    (root / "002.mp4").unlink()
    monkeypatch.setattr("precompute.discover.read_sources", lambda _: sources)
    found = look(config)
    assert found.warnings == ["002.mp4: cannot open: No such file or directory; left out of this plan"]
    assert (found.clips, found.skipped) == (5, [])


def test_each_change_is_named_and_orphans_are_counted(pipeline: Path, filled: Filled, tmp_path: Path) -> None:
    root, cache = filled
    write_video(root / "002.mp4", seed=99)
    write_video(root / "new.mp4", seed=98)
    write_captions(root, ["another", *(f"clip number {number}" for number in range(1, 6)), "new"])
    found = look(config_for(pipeline, root, cache))
    assert found.changed == [("002.mp4", "source bytes changed")] and found.new == 1
    assert (found.latents.made, found.prompts.made) == (2, 2)
    assert (found.orphaned["latents"], found.orphaned["prompts"]) == (1, 1) and found.orphaned["bytes"] > 0
    run(config_for(pipeline, root, cache))

    cropped = look(config_for(pipeline, root, cache, data={"video_reshape_mode": "random"}))
    assert {reason for _, reason in cropped.changed} == {"settings changed: data.video_reshape_mode"}
    assert len(cropped.changed) == 7 and cropped.prompts_recipe_changed == []
    sliced = look(config_for(pipeline, root, cache, enable_slicing=True, vae_dtype="bf16", text_dtype="bf16"))
    named = "precompute.enable_slicing, precompute.vae_dtype"
    assert {reason for _, reason in sliced.changed} == {f"recipe changed: {named}"}
    assert sliced.prompts_recipe_changed == ["precompute.text_dtype"]

    other = tmp_path / "pipeline"
    shutil.copytree(pipeline, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.conv.bias"] += 0.01
    save_file(tensors, weights, {"format": "pt"})
    revised = look(config_for(other, root, cache))
    assert {reason for _, reason in revised.changed} == {"recipe changed: vae.weights"}
    assert revised.latents.reused == 0 and revised.orphaned["latents"] == 8


def test_clip_whose_start_moved_has_a_changed_window(pipeline: Path, tmp_path: Path) -> None:
    root, cache = write_corpus(tmp_path / "clips", 1), tmp_path / "cache"
    data = {"dataset_name": str(tmp_path / "t.jsonl"), "caption_column": "text", "video_column": "video"}
    row = {"video": "000.mp4", "text": "a"}
    config = config_for(pipeline, root, cache, data=data | {"frame_buckets": [1]})
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    run(config)
    (tmp_path / "t.jsonl").write_text(json.dumps(row | {"start_seconds": 0.25}))
    assert look(config).changed == [("000.mp4", "window changed")]


def test_samples_of_another_view_are_no_orphans(pipeline: Path, filled: Filled) -> None:
    root, cache = filled
    data = {"name": "other", "video_reshape_mode": "random", "frame_buckets": [5]}
    found = look(config_for(pipeline, root, cache, data=data))
    assert found.orphaned["latents"] == 0 and found.new == 6


def test_damaged_view_is_a_warning(pipeline: Path, filled: Filled) -> None:
    root, cache = filled
    config = config_for(pipeline, root, cache)
    names = ("other", config.data.name)
    for name in names:
        (cache / "datasets" / f"{name}.json").write_bytes(b"{}")
    found = look(config)
    for name in names:
        assert [line for line in found.warnings if f"datasets/{name}" in line and "count as unused" in line]
    assert found.latents.made == 0 and found.changed == []


def test_lost_shard_and_retried_clip_are_named(pipeline: Path, filled: Filled) -> None:
    root, cache = filled
    storage = LocalStorage(str(cache))
    view = read_view(storage, "corpus")
    [key] = [row.latent_key for row in view.rows if row.source == "002.mp4"]
    for path in [*cache.glob("latents/*/5x16x32/*"), *cache.glob("assignments/*")]:
        path.unlink()
    assert {reason for _, reason in look(config_for(pipeline, root, cache)).changed} == {"no longer stored"}
    write_shard(storage, f"{view.latents.folder}/5x16x32", [], {key: "broken"})
    assert run(config_for(pipeline, root, cache)).skipped == [("002.mp4", "broken")]
    assert look(config_for(pipeline, root, cache, retry_skipped=True)).changed == [("002.mp4", "skipped before")]


def test_every_field_in_a_recipe_is_named_when_it_changes(pipeline: Path, tmp_path: Path) -> None:
    config = config_for(pipeline, tmp_path, tmp_path / "cache")
    storage, found = LocalStorage(str(tmp_path / "cache")), recipes.find_encoders(config)
    i2v = replace(found, conventions=replace(found.conventions, image_to_video=True))
    makers = {"latents": recipes.latents_recipe, "prompts": recipes.prompts_recipe}
    values: dict[str, Any] = {"vae_dtype": "bf16", "text_dtype": "fp16", "noised_image_count": 1}
    for kind, make in makers.items():
        before = make(config, i2v)
        old = collection_for(kind, before)
        write_recipe(storage, old, before)
        for field in fields_shaping("latents", "image_latents") if kind == "latents" else fields_shaping("prompts"):
            name = field.removeprefix("precompute.")
            changed = config_for(pipeline, tmp_path, tmp_path / "cache", **{name: values.get(name, True)})
            assert recipe_changes(storage, old, make(changed, i2v)) == [field]


def test_shards_too_large_to_read_are_refused(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = write_corpus(tmp_path / "clips", 6), tmp_path / "cache"
    monkeypatch.setattr("precompute.estimate.MAX_SHARD_BYTES", 40_000)
    for change in ({"clips_per_shard": 6}, {"prompts_per_shard": 6}):
        settings: dict[str, Any] = {"clips_per_shard": 1, "prompts_per_shard": 1} | change
        config = config_for(pipeline, root, cache, **settings)
        for attempt in (look, run):
            with pytest.raises(UsageError, match=rf"precompute.{next(iter(change))} = 6: 6 of .*; set it to \d"):
                attempt(config)
    assert not list(cache.rglob("*.json"))
