"""Stage 2 against a plain end-to-end trainer, on a CPU: seconds per step, peak memory, seconds to the first step.

`make bench-train` runs three processes per model. `ours` is the loop of `precog train` on a cache. `plain` is
bench/plain.py: VAE, T5 and transformer stay loaded, clips are encoded at the start and the caption in every step, as in
diffusers' train_cogvideox_lora.py. `control` is `ours` again. They take turns, ours-plain-plain-ours and
ours-control-control-ours, so that other load affects all of them. The report is the median of the ratios of neighboring
turns with a 95 % bootstrap interval; the control's interval is noise. Two processes of the same program differ by a few
per cent, so all are started several times, and the bootstrap draws starts first, then turns. tests/train/test_golden.py
checks that both train the same.
"""

import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench import record
from shared.config import Config, Data, Model, Precompute, Train
from shared.signals import StopSignal

ROOT = Path(__file__).parents[1]
FRAMES, HEIGHT, WIDTH, TEXT_LENGTH = 17, 64, 96, 226
CONTEXT = get_context("spawn")


@dataclass(frozen=True)
class Size:
    """A random model and how it is measured."""

    name: str
    transformer: dict[str, int]
    text: dict[str, int]
    vae: dict[str, Any]
    starts: int
    """Number of times that all three processes are started."""
    rounds: int
    """Rounds per start; a round is one pair of turns of ours and plain, and one of ours and control."""
    steps: int
    """Optimizer steps per turn."""


SIZES = (
    Size(
        "tiny",
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 48},
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 2},
        5,
        8,
        4,
    ),
    Size(
        "36M",
        {"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 6, "time_embed_dim": 384},
        {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
        {"block_out_channels": [32, 64, 64, 128], "layers_per_block": 2, "norm_num_groups": 8},
        5,
        8,
        1,
    ),
)


class Turns:
    """In an arm's process: waits for turns through the pipe and sends back their wall and CPU seconds."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._steps, self._begun = pipe, 0, (0.0, 0.0)
        pipe.send("ready")

    def step(self) -> None:
        """Count one step; wait between turns, and end the process after the last."""
        self._steps -= 1
        if self._steps > 0:
            return
        now = (time.perf_counter(), time.process_time())
        took = tuple(after - before for after, before in zip(now, self._begun, strict=True))
        self._pipe.send((*took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        self._steps = self._pipe.recv()
        self._begun = (time.perf_counter(), time.process_time())
        if self._steps == 0:
            raise SystemExit


class Polled(StopSignal):
    """A signal that never comes; each read of `requested` but the one before the first step calls `poll`."""

    def __init__(self, poll: Callable[[], None]) -> None:
        self._poll, self._begun = poll, False
        super().__init__()

    @property
    def requested(self) -> bool:
        if self._begun:
            self._poll()
        self._begun = True
        return False

    @requested.setter
    def requested(self, value: bool) -> None:
        assert not value


def main() -> None:
    found: dict[str, Any] = {"circumstances": record.circumstances(), "models": {}}
    tables = ["Stage 2 on the CPU, one thread a process; ratios of seconds.\n"]
    for size in SIZES:
        with TemporaryDirectory() as folder:
            found["models"][size.name] = measure(size, Path(folder))
        tables.append(as_markdown(size.name, found["models"][size.name]))
        print(tables[-1])
    record.write("cpu-train", found, "\n".join([*tables, record.describe(found["circumstances"])]))


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """Measure one model."""
    config = make_config(folder)
    numbers = in_child(prepare, size, config)
    pairs: dict[str, list[list[list[tuple[float, ...]]]]] = {"plain": [], "control": []}
    for start in range(size.starts):
        arms = (("ours", ours), ("plain", plain), ("control", ours))
        workers = {name: Worker(arm, config, f"{name}{start}") for name, arm in arms}
        for worker in workers.values():
            worker.turn(size.steps)  # warm-up
        for taken in pairs.values():
            taken.append([])
        for number in range(size.rounds):
            for other in pairs:
                names = ["ours", other] if number % 2 else [other, "ours"]
                turns = {name: workers[name].turn(size.steps) for name in names}
                pairs[other][-1].append([turns["ours"], turns[other]])
        started = {name: worker.start_seconds for name, worker in workers.items()}
        peaks = {name: worker.finish() for name, worker in workers.items()}
    report: dict[str, Any] = {"parameters": numbers, "steps_per_turn": size.steps}
    report |= {"starts": size.starts, "rounds_per_start": size.rounds}
    report["start_to_first_step_seconds"] = started
    report["peak_rss_bytes"] = peaks
    for other, taken in pairs.items():
        for column, kind in enumerate(("wall", "cpu")):
            ratios = [[ours[column] / theirs[column] for ours, theirs in turns] for turns in taken]
            report[f"ours/{other} {kind}"] = record.interval(ratios)
    control = [report[f"ours/control {kind}"] for kind in ("wall", "cpu")]
    report["noise_band"] = max(abs(bound[end] - 1) for bound in control for end in ("low", "high"))
    report["seconds_per_step"] = {
        name: float(np.median([turn[index][0] for turns in taken for turn in turns]) / size.steps)
        for name, taken, index in (("ours", pairs["plain"], 0), ("plain", pairs["plain"], 1))
    }
    report["samples"] = pairs
    return report


class Worker:
    """One arm in its own process."""

    def __init__(self, arm: Callable[[Config, Connection], None], config: Config, name: str) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        folder = config.train.output_dir.with_name(name)
        config = config.model_copy(update={"train": config.train.model_copy(update={"output_dir": folder})})
        self._process = CONTEXT.Process(target=silenced, args=(arm, config, theirs), daemon=True)
        begun = time.perf_counter()
        self._process.start()
        theirs.close()  # so that the pipe closes when the process ends
        assert self._pipe.recv() == "ready"
        self._peak = self._pipe.recv()[2]
        self.start_seconds = time.perf_counter() - begun

    def turn(self, steps: int) -> tuple[float, ...]:
        """Run `steps` steps; return their wall and CPU seconds."""
        self._pipe.send(steps)
        wall, cpu, self._peak = self._pipe.recv()
        return wall, cpu

    def finish(self) -> int:
        """End the process; return its peak resident bytes."""
        self._pipe.send(0)
        self._process.join()
        return int(self._peak)


def silenced(arm: Callable[[Config, Connection], None], config: Config, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    config.train.output_dir.mkdir(parents=True)
    with (config.train.output_dir / "log.txt").open("w", encoding="utf-8") as log, redirect_stderr(log):
        arm(config, pipe)


def ours(config: Config, pipe: Connection) -> None:
    """Run `precog train`, paced."""
    from train.loop import train

    train(config, Polled(Turns(pipe).step))


def plain(config: Config, pipe: Connection) -> None:
    """Run bench/plain.py, paced."""
    from bench.plain import train_plainly

    train_plainly(config, Turns(pipe).step)


def make_config(folder: Path) -> Config:
    return Config(
        model=Model(pretrained_model_name_or_path=str(folder / "model")),
        data=Data(
            name="bench",
            instance_data_root=ROOT / "demo" / "clips",
            caption_column="prompts.txt",
            video_column="videos.txt",
            fps=0,
            max_num_frames=FRAMES,
            frame_buckets=(FRAMES,),
            height=HEIGHT,
            width=WIDTH,
        ),
        precompute=Precompute(cache=str(folder / "cache")),
        train=Train(
            output_dir=folder / "run",
            lora_rank=16,
            lora_alpha=16,
            max_train_steps=10**6,
            checkpointing_steps=10**6,
            device="cpu",
        ),
    )


def in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `work` from a process that ends afterwards and frees its memory."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(work, *arguments).result()


def prepare(size: Size, config: Config) -> dict[str, int]:
    """Write the random model and run stage 1; return the number of parameters of each part."""
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    from shared.console import quiet_libraries
    from tests import tiny

    quiet_libraries()
    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer(TEXT_LENGTH)
    text = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", tie_word_embeddings=False, **size.text)
    changes = {**size.transformer, "text_embed_dim": size.text["d_model"], "sample_frames": FRAMES}
    parts = {
        "transformer": CogVideoXTransformer3DModel(**(tiny.transformer_config("2b", TEXT_LENGTH) | changes)),
        "text_encoder": T5EncoderModel(text),
        "vae": AutoencoderKLCogVideoX(**(tiny.vae_config("2b") | size.vae)),
    }
    pipeline = CogVideoXPipeline(tokenizer=tokenizer, scheduler=tiny.build_scheduler("2b"), **parts)
    pipeline.save_pretrained(config.model.pretrained_model_name_or_path, safe_serialization=True)
    from precompute.run import precompute

    precompute(config)
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def as_markdown(name: str, report: dict[str, Any]) -> str:
    """Return the tables of one model."""
    ratios = {key: value for key, value in report.items() if isinstance(value, dict) and "median" in value}
    started, peaks = report["start_to_first_step_seconds"], report["peak_rss_bytes"]
    rows = {
        "seconds per step": report["seconds_per_step"],
        "peak RSS, MiB": {arm: peak / 2**20 for arm, peak in peaks.items()},
        "seconds to the first step, last start": started,
    }
    counts = [f"{report[key]} {key.partition('_')[0]}" for key in ("starts", "rounds_per_start", "steps_per_turn")]
    return "\n".join(
        [
            f"## {name}: {' of '.join(counts)}\n",
            record.table(("ratio", "median", "low", "high"), [[key, *value.values()] for key, value in ratios.items()]),
            f"A ratio closer to 1 than {report['noise_band']:.3f}, the control's band, is noise.\n",
            record.table(("", "ours", "plain"), [[name, row["ours"], row["plain"]] for name, row in rows.items()]),
        ]
    )


if __name__ == "__main__":
    main()
