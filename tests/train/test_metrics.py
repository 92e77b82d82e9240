"""Metrics of a run: metrics.jsonl, the table at the end, the loss curve."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.config import Config
from shared.errors import DataError
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from train.loop import train
from train.metrics import EMA_DECAY, HEADER, EmaLoss, Metrics, finish_metrics

Settings = Callable[..., Config]
FIELDS = {"step", "loss", "ema_loss", "lr", "grad_norm", "samples", "tokens", "packs", "seconds", "data_wait_seconds"}


def line(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    values = {"ema_loss": loss, "lr": 1e-3, "grad_norm": 0.1, "samples": 2, "tokens": 100, "packs": 1, "seconds": 0.5}
    return {"step": step, "loss": loss, **values, "data_wait_seconds": 0.0, "peak_memory_bytes": 2**20, **more}


def smoothed(losses: list[float]) -> list[float]:
    average = EmaLoss()
    return [average.add(loss) for loss in losses]


def write(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(values) + "\n" for values in lines)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")


def test_lines_beyond_the_checkpoint_are_removed(tmp_path: Path) -> None:
    write(tmp_path, [line(1), line(2), line(3, base_held_out_loss=0.5)], tail='{"step": 4, "lo')
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2, 3]
    assert Metrics(tmp_path, 3, 10).base_held_out_loss == 0.5
    metrics = Metrics(tmp_path, 2, 10)
    assert metrics.base_held_out_loss is None
    metrics.write(line(3, 7.0))
    assert [values["loss"] for values in read_metrics(tmp_path)] == [1, 1, 7]


@pytest.mark.parametrize(
    ("content", "words"), [(b'{"step": "\xff"}', "not JSON lines"), (b'{"step": 2}', "line 2: not a step")]
)
def test_a_line_that_is_no_step_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    write(tmp_path, [line(1)])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(content + b"\n")
    with pytest.raises(DataError, match=words):
        read_metrics(tmp_path)


def test_a_run_without_its_metrics_is_exported_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared import console

    config = settings(max_train_steps=2)
    train(config, StopSignal())
    (config.train.output_dir / "metrics.jsonl").unlink()
    shutil.rmtree(config.train.output_dir / "export")
    shown: list[str] = []
    monkeypatch.setattr(console, "say", shown.append)
    train(config, StopSignal())
    assert any("metrics.jsonl: steps 1 to 2 are missing" in text for text in shown)
    table = shown[shown.index("Trained") :]
    assert len(table) == 2
    assert table[1].endswith("export/pytorch_lora_weights.safetensors")


def test_the_ema_loss_is_the_published_average() -> None:
    """Written out as sums: (1 - d) sum d^(t-i) loss_i / (1 - d^t)."""
    losses = [float((7 * step) % 11) for step in range(1, 101)]
    expected = [
        (1 - EMA_DECAY)
        * sum(EMA_DECAY ** (number - index) * loss for index, loss in enumerate(losses[:number], 1))
        / (1 - EMA_DECAY**number)
        for number in range(1, 101)
    ]
    assert smoothed(losses) == pytest.approx(expected, rel=1e-12)
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)


@pytest.mark.parametrize("cut", [0, 30])
def test_a_resumed_ema_loss_is_the_straight_one(cut: int, tmp_path: Path) -> None:
    lines = [line(step, 1 / step) for step in range(1, 61)]
    for folder, kept in ((tmp_path / "straight", 60), (tmp_path / "resumed", cut)):
        folder.mkdir()
        metrics = Metrics(folder, 0, 60)
        for values in lines[: max(kept, cut + 5)]:  # a few more than the checkpoint knows of
            metrics.write(values)
    metrics = Metrics(tmp_path / "resumed", cut, 60)
    for values in lines[cut:]:
        metrics.write(values)
    straight, resumed = (read_metrics(tmp_path / name) for name in ("straight", "resumed"))
    assert straight == resumed
    assert [values["ema_loss"] for values in straight] == smoothed([values["loss"] for values in lines])


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the lines that are said."""
    from shared import console

    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    return lines


def test_the_table_leads_with_the_held_out_loss(tmp_path: Path, shown: list[str]) -> None:
    first = {"held_out_loss": 2.25, "base_held_out_loss": 3.0, "peak_memory_bytes": 2**30, "data_wait_seconds": 0.5}
    lines = [line(1, 4.0, seconds=1.0, **first), line(2, 2.0, seconds=3.0, held_out_loss=2.5)]
    write(tmp_path, lines)
    finish_metrics(tmp_path)
    assert [text.split(maxsplit=1)[0] for text in shown] == [
        "Trained",
        "result",
        "best",
        "training",
        "steps",
        "clips",
        "peak",
        "adapter",
    ]
    assert shown[1].endswith("2.50000, base model 3.00000, gain +16.7%")
    assert shown[2].endswith(f"2.25000 at step 1, in {tmp_path / 'export' / 'best'}")
    assert shown[3].endswith("2.00000 EMA, 3.00000 mean of the first 2")
    assert shown[4].endswith("2 in 0:00:04, 12.50% waiting") and shown[6].endswith("1.0 GiB")


def test_the_line_shows_the_time_left_in_80_columns(
    tmp_path: Path, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of one second, each tenth followed by an evaluation of ten: two seconds on average."""
    now = [100.0]
    monkeypatch.setattr("train.metrics.time.monotonic", lambda: now[0])
    with Metrics(tmp_path, 0, 10_000) as metrics:
        for step in range(1, 101):
            now[0] += 11.0 if step % 10 == 0 else 1.0
            metrics.write(line(step, 10.0 ** (step % 9), seconds=1.0, peak_memory_bytes=80 * 2**30))
    assert len(shown[0]) == len(HEADER) < 80 and {len(text) for text in shown} == {len(HEADER)}
    assert shown[1].split()[-4:-2] == ["0:00:01", "2:46:39"]
    assert 11 <= len(shown) <= 13, "one line every ten seconds or more"
