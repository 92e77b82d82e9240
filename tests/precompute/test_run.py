"""Stage 1 from end to end: the cost of each change, skips, failures and reruns."""

import json
import os
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from precompute import latents, prompts
from precompute.encoders import VaeEncoder
from precompute.report import PassResult, Report
from shared.cache.collection import SampleReader, shards
from shared.cache.index import INDEX, receipt_names
from shared.cache.shard import Receipt, ShardWriter
from shared.cache.storage import LocalStorage
from shared.cache.verify import verify
from shared.cache.view import read_view
from shared.errors import CacheError, DataError, UsageError
from shared.sources.rows import read_sources
from tests.corpus import config_for, count_storage_calls, run, stored_files, write_captions, write_corpus, write_video
from tests.media import decode_probed
from tests.tiny import save_pipeline

CLIPS = 6
SETTINGS: dict[str, Any] = {"clips_per_shard": 4, "vae_batch_size": 3}
Filled = tuple[Path, Path]


def counts(report: Report) -> tuple[int, int, int, int]:
    """Return the latents encoded and reused, and the prompts encoded and reused."""
    return report.latents.made, report.latents.reused, report.prompts.made, report.prompts.reused


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "clips", CLIPS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, pipeline: Path, corpus: Path) -> Path:
    """Fill a cache with the whole corpus."""
    folder = tmp_path_factory.mktemp("run") / "cache"
    report = run(config_for(pipeline, corpus, folder, **SETTINGS))
    assert counts(report) == (CLIPS, 0, CLIPS + 2, 0)
    files = [path for kind in ("latents", "prompts") for path in (folder / kind).rglob("*.*")]
    assert report.written_bytes == sum(path.stat().st_size for path in files if path.name not in ("recipe.json", INDEX))
    return folder


def test_each_change_costs_only_what_it_touches(pipeline: Path, corpus: Path, cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "moved"
    shutil.copytree(corpus, root)
    for path in root.glob("*.mp4"):
        os.utime(path, (1, 1))
    assert counts(run(config_for(pipeline, root, cache, **SETTINGS))) == (0, CLIPS, 0, CLIPS + 2)

    captions = [f"clip number {number}" for number in range(CLIPS)]
    write_captions(root, ["another caption", *captions[1:]])
    write_video(root / "005.mp4", seed=1005)
    assert counts(run(config_for(pipeline, root, cache, **SETTINGS))) == (1, CLIPS - 1, 1, CLIPS + 1)

    cropped = config_for(pipeline, root, cache, data={"video_reshape_mode": "random"}, **SETTINGS)
    assert counts(run(cropped)) == (CLIPS, 0, 0, CLIPS + 2)

    other = tmp_path / "pipeline"
    shutil.copytree(pipeline, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.conv.bias"] += 0.01
    save_file(tensors, weights, {"format": "pt"})
    assert counts(run(config_for(other, root, cache, **SETTINGS))) == (CLIPS, 0, 0, CLIPS + 2)


def test_stored_moments_are_the_vaes_own(pipeline: Path, filled: Filled) -> None:
    import av
    from diffusers import AutoencoderKLCogVideoX

    root, cache = filled
    storage = LocalStorage(str(cache))
    view = read_view(storage, "corpus")
    vae = AutoencoderKLCogVideoX.from_pretrained(pipeline / "vae")
    [row] = [row for row in view.rows if row.source == "003.mp4"]
    with av.open(str(root / "003.mp4")) as video:
        frames = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)])
    pixels = (frames[:, 8:24].permute(3, 0, 1, 2).float() - 127.5) / 127.5
    with torch.no_grad():
        expected = vae.encode(pixels[None]).latent_dist.parameters[0]
    stored = SampleReader(storage, view.latents).read(row.latent_key)
    torch.testing.assert_close(stored["moments"], expected)
    means = torch.nn.functional.avg_pool2d(frames[:, 8:24].float().permute(0, 3, 1, 2), 8)
    torch.testing.assert_close(stored["thumbnails"][0].float(), means[0], rtol=0, atol=0.51)
    torch.testing.assert_close(stored["thumbnails"][1].float(), means[1:5].mean(0), rtol=0, atol=0.51)


def test_image_moments_are_of_the_clips_own_first_frame(tmp_path: Path) -> None:
    from precompute.clip_encoder import conditioning_images, conditioning_noise
    from shared.config import Model, Precompute
    from shared.media.probe import probe
    from shared.model.pretrained import pretrained_part

    pipeline, root = save_pipeline("1.5-5b-i2v", tmp_path / "i2v"), write_corpus(tmp_path / "clips", 2)
    run(config_for(pipeline, root, tmp_path / "cache", data={"random_flip": True}, noised_image_count=2))
    storage = LocalStorage(str(tmp_path / "cache"))
    view = read_view(storage, "corpus")
    assert sorted((row.source, row.flip) for row in view.rows) == [
        (name, flip) for name in ("000.mp4", "001.mp4") for flip in (False, True)
    ]
    part = pretrained_part(Model(pretrained_model_name_or_path=str(pipeline)), "vae")
    encoder = VaeEncoder(part, Precompute(cache="unused", vae_dtype="fp32"), torch.device("cpu"))
    for row in view.rows:
        found = probe(root / row.source)
        frames = decode_probed(root / row.source, found, range(5))[0]
        pixels = (torch.from_numpy(frames)[:, 8:24].permute(3, 0, 1, 2).float() - 127.5) / 127.5
        pixels = pixels.flip(3) if row.flip else pixels
        noises = conditioning_noise(row.bucket, 2, row.latent_key)
        images = conditioning_images(pixels[:, :1], [torch.from_numpy(noise) for noise in noises])
        stored = SampleReader(storage, view.latents).read(row.latent_key)
        torch.testing.assert_close(stored["moments"], encoder.encode(pixels[None])[0])
        torch.testing.assert_close(
            stored["image_moments"], torch.cat([encoder.encode(image[None]) for image in images])
        )


def test_clip_that_cannot_be_encoded_is_retried_on_demand(pipeline: Path, tmp_path: Path) -> None:
    root, cache = write_corpus(tmp_path / "clips", 3), tmp_path / "cache"
    other = tmp_path / "pipeline"
    shutil.copytree(pipeline, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_out.conv.bias"] += float("inf")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(DataError, match="no clip is left to train on"):
        run(config_for(other, root, cache))
    [(_, receipt)] = shards(LocalStorage(str(cache)), "latents")
    assert list(receipt.skipped.values()) == ["non-finite latents; set precompute.vae_dtype = 'fp32'"] * 3
    receipts = set(cache.glob("latents/*/5x16x32/*.json"))
    with pytest.raises(DataError):
        run(config_for(other, root, cache))
    assert set(cache.glob("latents/*/5x16x32/*.json")) == receipts, "tried again without being asked"
    with pytest.raises(DataError):
        run(config_for(other, root, cache, retry_skipped=True))
    assert len(set(cache.glob("latents/*/5x16x32/*.json"))) == 2 * len(receipts)


def test_shard_set_aside_is_made_again_with_the_same_bytes(pipeline: Path, filled: Filled) -> None:
    root, cache = filled
    before = stored_files(cache)
    tar = min(cache.glob("latents/*/*/*.tar"))
    damaged = bytearray(tar.read_bytes())
    damaged[700] ^= 1
    tar.write_bytes(damaged)
    checked, found = verify(LocalStorage(str(cache)), repair=True)
    assert checked == 3 and len(found) == 1 and str(tar) in found[0]
    kept = sum(len(receipt.samples) for _, receipt in shards(LocalStorage(str(cache)), "latents"))
    assert run(config_for(pipeline, root, cache)).latents.made == 6 - kept > 0
    after = {name: content for name, content in stored_files(cache).items() if not name.endswith(".damaged")}
    assert after == before


def test_full_disk_is_refused_before_encoding(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = write_corpus(tmp_path / "clips", 2), tmp_path / "cache"
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda _: 10_000)
    with pytest.raises(CacheError, match=r"needs about .* KiB, has 9\.8 KiB free"):
        run(config_for(pipeline, root, cache))
    assert not cache.exists()


@pytest.mark.faults
def test_moments_of_another_shape_end_the_run(pipeline: Path, tmp_path: Path) -> None:
    root, cache, other = write_corpus(tmp_path / "clips", 3), tmp_path / "cache", tmp_path / "pipeline"
    shutil.copytree(pipeline, other)
    config = other / "vae" / "config.json"
    config.write_text(config.read_text("utf-8").replace('"sample_height": 96', '"sample_height": 64'), "utf-8")
    data = {"resolution_buckets": [[64, 64]]}
    with pytest.raises(UsageError) as error:
        run(config_for(other, root, cache, data=data, enable_tiling=True))
    assert str(error.value) == (
        "precompute.enable_tiling = true: the VAE's tiles do not fit clips of 5x64x64: expected moments of "
        "32x2x8x8, got 32x2x9x8; leave it false or choose other data.resolution_buckets"
    )
    assert not list(cache.glob("latents/*/*/*"))
    assert run(config_for(other, root, cache, data=data)).latents.made == 3


def test_run_without_clips_to_train_on_keeps_the_old_view(pipeline: Path, filled: Filled) -> None:
    root, cache = filled
    views = {path.name: path.read_bytes() for path in (cache / "datasets").iterdir()}
    with pytest.raises(DataError, match=r"left to train on \(data\.held_out_clips takes all \d\)"):
        run(config_for(pipeline, root, cache, data={"held_out_clips": 100}))
    (root / "bad.mp4").write_bytes(b"no video")
    (root / "prompts.txt").write_text("\n".join("abcde"), "utf-8")
    (root / "videos.txt").write_text("\n".join(["bad.mp4"] * 5), "utf-8")
    with pytest.raises(DataError, match=r"train on \(bad\.mp4: not a video: [^;]*\); add clips"):
        run(config_for(pipeline, root, cache))
    assert {path.name: path.read_bytes() for path in (cache / "datasets").iterdir()} == views


def losing(patch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Make the files vanish after they are probed."""

    def encode_and_lose(*arguments: Any) -> PassResult:
        result = prompts.encode_prompts(*arguments)
        for path in paths:
            path.unlink(missing_ok=True)
        return result

    patch.setattr("precompute.run.encode_prompts", encode_and_lose)


def keys_in(cache: Path) -> dict[str, list[str]]:
    """Return key -> the shards that store or skip it."""
    found: dict[str, list[str]] = {}
    for tar, receipt in shards(LocalStorage(str(cache)), "latents"):
        for key in (*(place.key for place in receipt.samples), *receipt.skipped):
            found.setdefault(key, []).append(tar)
    return found


def test_file_that_vanishes_is_a_transient_failure(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = write_corpus(tmp_path / "clips", 6), tmp_path / "cache"
    (root / "004.mp4").write_bytes(b"no video")
    config = config_for(pipeline, root, cache)
    run(config_for(pipeline, root, cache, data={"resolution_buckets": [[32, 16]]}))  # the view that was there
    views = {path.name: path.read_bytes() for path in (cache / "datasets").iterdir()}
    content = (root / "003.mp4").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(DataError) as error:
        losing(patch, root / "003.mp4")
        run(config)
    assert str(error.value) == (
        "1 files could not be read (003.mp4: cannot open: No such file or directory); the other clips are stored "
        "and the previous view is unchanged; run the same command again"
    )
    assert len(keys_in(cache)) == 5 + 4
    assert {path.name: path.read_bytes() for path in (cache / "datasets").iterdir()} == views
    (root / "003.mp4").write_bytes(content)
    report = run(config)
    assert (report.latents.made, report.latents.reused, report.clips) == (1, 4, 5)
    assert len(keys_in(cache)) == 10 and all(len(tars) == 1 for tars in keys_in(cache).values())


def test_files_that_cannot_be_probed_are_named_together(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = write_corpus(tmp_path / "clips", 6), tmp_path / "cache"
    sources = read_sources(config_for(pipeline, root, cache).data)
    for number in range(5):
        (root / f"{number:03}.mp4").unlink()
    monkeypatch.setattr("precompute.discover.read_sources", lambda _: sources)
    with pytest.raises(DataError, match=r"^5 files .*000\.mp4: .*002\.mp4: .*directory; and 2 more\)"):
        run(config_for(pipeline, root, cache))
    assert len(keys_in(cache)) == 1 and not (cache / "datasets").exists()


@pytest.mark.faults
def test_clip_read_by_another_worker_is_no_failure(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache, elsewhere = write_corpus(tmp_path / "clips", 3), tmp_path / "cache", tmp_path / "elsewhere"
    shutil.copytree(root, elsewhere)

    class FinishesFirst(ShardWriter):
        def finish(self, skipped: Mapping[str, str], attempt: int) -> tuple[Receipt, int]:
            monkeypatch.undo()
            written = super().finish(skipped, attempt)
            assert len(keys_in(cache)) == 2, "all but the lost clip"
            run(config_for(pipeline, elsewhere, cache))
            return written

    losing(monkeypatch, root / "001.mp4")
    monkeypatch.setattr(latents, "ShardWriter", FinishesFirst)
    assert run(config_for(pipeline, root, cache)).clips == 3


def test_rerun_reads_each_receipt_once(
    pipeline: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(pipeline, corpus, cache, **SETTINGS)
    run(config)
    calls = count_storage_calls(monkeypatch)
    report = run(config)
    assert (report.latents.made, report.prompts.made) == (0, 0)
    view = read_view(LocalStorage(str(cache)), "corpus")
    collections = {view.latents.folder: 1, view.prompts.folder: 1}
    assert {name: count for (method, name), count in calls.items() if method == "files"} == collections
    reads = {name: count for (method, name), count in calls.items() if method in ("read", "size", "path")}
    receipts = [name for folder in collections for name in receipt_names(LocalStorage(str(cache)).files(folder))]
    reads = {name: count for name, count in reads.items() if not name.startswith(("datasets/", "probes/"))}
    assert reads == dict.fromkeys([*receipts, *(f"{folder}/{INDEX}" for folder in collections)], 1)


def test_the_environment_is_recorded_once_per_recipe_and_changes_no_file(
    pipeline: Path, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = filled
    recipes = {path.parent.name for path in cache.glob("*/*/recipe.json")}
    records = {path.parent.name: json.loads(path.read_bytes()) for path in cache.glob("made_by/*/*.json")}
    assert records.keys() == recipes
    assert all(made_by["versions"]["torch"] == metadata.version("torch") for made_by in records.values())
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} 9.9")
    run(config_for(pipeline, root, tmp_path / "other"))
    assert stored_files(tmp_path / "other") == stored_files(cache)
