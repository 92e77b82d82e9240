"""Stage 2 and the encoders it must not load: it knows them by size and time, else by hash, and refuses others."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.cache.storage import LocalStorage
from shared.cache.view import read_view
from shared.config import Config, save_config
from shared.errors import CacheError
from shared.model.pretrained import present_part
from tests.experiments import fill_cache, write_experiment
from tests.tiny import build_text_encoder, build_vae
from train.open_run import open_run

WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    fill_cache(write_experiment("5b", folder))
    return folder


@pytest.fixture
def experiment(original: Path, tmp_path: Path) -> tuple[Path, Config]:
    folder = tmp_path / "experiment"
    shutil.copytree(original, folder)
    return folder, write_experiment("5b", folder, max_train_steps=1)


def test_view_remembers_size_and_time_of_the_encoders(experiment: tuple[Path, Config]) -> None:
    folder, config = experiment
    view = read_view(LocalStorage(config.precompute.cache), "two")
    assert set(view.encoders) == set(WEIGHTS)
    for name, file in WEIGHTS.items():
        status = (folder / "model" / name / file).stat()
        assert view.encoders[name] == ((status.st_size, status.st_mtime_ns),)
        part = present_part(config.model, name)
        assert part is not None and part.marks == view.encoders[name]


def spoil(file: Path) -> None:
    """Other bytes under the same size and time, which only a reader of the file can notice."""
    status = file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


WATCHED = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import precog
try:
    precog.app(["train", sys.argv[1]])
except SystemExit as end:
    code = end.code
parts = [path for path in opened if "/model/vae/" in path or "/model/text_encoder/" in path]
print(code, [path for path in parts if path.endswith(".safetensors")])
print([name for name in sys.modules if "autoencoder_kl_cogvideox" in name or "t5.modeling_t5" in name])
"""


def test_training_neither_reads_nor_imports_the_encoders(experiment: tuple[Path, Config]) -> None:
    """Their files are zeros here, so that reading them in any way, safetensors' own included, ends the run."""
    folder, config = experiment
    for name, file in WEIGHTS.items():
        spoil(folder / "model" / name / file)
    save_config(config, folder / "experiment.toml")
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, str(folder / "experiment.toml")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.splitlines() == ["0 []", "[]"], result.stderr
    assert (config.train.output_dir / "export").is_dir()


def another_vae(folder: Path) -> None:
    build_vae("5b", seed=1).save_pretrained(folder / "model/vae")


def another_t5(folder: Path) -> None:
    build_text_encoder(seed=1).save_pretrained(folder / "model/text_encoder")


def another_tokenizer(folder: Path) -> None:
    file = folder / "model/tokenizer/tokenizer.json"
    file.write_bytes(file.read_bytes() + b"\n")


def another_scaling_factor(folder: Path) -> None:
    file = folder / "model/vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"scaling_factor": 1.5}), "utf-8")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (another_vae, r"view two: the cache was made with another VAE than .*: the weights differ; run `precog"),
        (another_t5, r"view two: the cache was made with another T5 than .*: the weights differ; run `precog"),
        (another_tokenizer, r"view two: the cache was made with another tokenizer than .*: tokenizer.json differs"),
        (another_scaling_factor, r"another VAE than .*: scaling_factor was 0.7, is 1.5; run `precog precompute`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_cache_of_another_encoder_is_refused(
    change: Callable[[Path], None], line: str, experiment: tuple[Path, Config]
) -> None:
    folder, config = experiment
    change(folder)
    with pytest.raises(CacheError, match=line):
        open_run(config)
    fill_cache(config)  # which is what the line says to do
    open_run(config)


def test_same_bytes_with_other_times_are_the_same_encoder(experiment: tuple[Path, Config]) -> None:
    folder, config = experiment
    for name, file in WEIGHTS.items():
        os.utime(folder / "model" / name / file, ns=(1, 1))
    open_run(config)


def test_machine_with_only_the_transformer_trains(experiment: tuple[Path, Config]) -> None:
    folder, config = experiment
    for name in (*WEIGHTS, "tokenizer"):
        shutil.rmtree(folder / "model" / name)
    open_run(config)


def test_half_a_download_of_an_encoder_is_none(experiment: tuple[Path, Config]) -> None:
    folder, config = experiment
    for name, file in WEIGHTS.items():
        (folder / "model" / name / file).unlink()
    open_run(config)


def test_damaged_record_of_the_encoders_is_a_damaged_view(experiment: tuple[Path, Config]) -> None:
    folder, config = experiment
    file = folder / "cache/datasets/two.json"
    about = json.loads(file.read_bytes())
    for encoders in (None, [], {"vae": 3}, {"vae": [[1]]}):
        file.write_text(json.dumps(about | {"encoders": encoders}), "utf-8")
        with pytest.raises(CacheError, match="damaged view"):
            open_run(config)
