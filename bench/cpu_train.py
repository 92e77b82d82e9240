"""Stage 2 beside a plain end-to-end trainer, on a CPU: seconds per step, peak memory, seconds to the first step.

`python -m bench.cpu_train` runs three processes per model, each as it would be started by hand. `ours` is the loop of
`precog train` on a cache. `plain` keeps VAE, T5 and transformer loaded, encodes the clips at its start and the caption
in every step, and trains with diffusers' forward, as diffusers' train_cogvideox_lora.py does. `control` is ours once
more. They take turns, ours-plain-plain-ours and ours-control-control-ours, so that a busy machine meets all alike. What
is reported is the median of the ratios of neighbouring turns with a 95 % bootstrap interval; the control's is noise.
Two processes of the same program differ by a few per cent for as long as they live, so all are started several times,
and the bootstrap draws starts first and turns within them after.
That both train the same is held by tests/train/test_golden.py.
"""

import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from shared.config import Config, Data, Model, Precompute, Train
from shared.preemption import StopSignal
from shared.seeding import generator

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "cpu_train.json"
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
    """How many times all three processes are started anew."""
    rounds: int
    """Of each start; a round is one pair of turns of ours and plain and one of ours and control."""
    steps: int
    """Optimizer steps of a turn."""


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


class Turns(StopSignal):
    """What the loop polls once per step: waits here for its turn, and tells what its turn took."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._left, self._begun = pipe, 0, (0.0, 0.0)
        pipe.send("ready")
        super().__init__()

    @property
    def requested(self) -> bool:
        self._left -= 1
        if self._left > 0:
            return False
        now = (time.perf_counter(), time.process_time())
        took = tuple(after - before for after, before in zip(now, self._begun, strict=True))
        self._pipe.send((*took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        self._left = self._pipe.recv()
        self._begun = (time.perf_counter(), time.process_time())
        if self._left == 0:
            raise SystemExit
        return False

    @requested.setter
    def requested(self, value: bool) -> None:
        assert not value


def main() -> None:
    results = {}
    for size in SIZES:
        with TemporaryDirectory() as folder:
            results[size.name] = measure(size, Path(folder))
            print(table(size.name, results[size.name]))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine(), "models": results}, indent=1) + "\n", encoding="utf-8")
    tables = "\n".join(table(name, report) for name, report in results.items())
    RESULT.with_suffix(".md").write_text(tables, encoding="utf-8")


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """All of one model."""
    config = make_config(folder)
    numbers = in_child(prepare, size, config)
    pairs: dict[str, list[list[list[tuple[float, ...]]]]] = {"plain": [], "control": []}
    for start in range(size.starts):
        arms = (("ours", ours), ("plain", plain), ("control", ours))
        workers = {name: Worker(arm, config, f"{name}{start}") for name, arm in arms}
        for worker in workers.values():
            worker.turn(size.steps)  # warm
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
    report["peak_rss_ratio"] = peaks["ours"] / peaks["plain"]
    for other, taken in pairs.items():
        for column, kind in enumerate(("wall", "cpu")):
            ratios = [[ours[column] / theirs[column] for ours, theirs in turns] for turns in taken]
            report[f"ours/{other} {kind}"] = asdict(interval(ratios))
    control = [report[f"ours/control {kind}"] for kind in ("wall", "cpu")]
    report["noise_band"] = max(abs(bound[end] - 1) for bound in control for end in ("low", "high"))
    report["seconds_per_step"] = {
        name: float(np.median([turn[index][0] for turns in taken for turn in turns]) / size.steps)
        for name, taken, index in (("ours", pairs["plain"], 0), ("plain", pairs["plain"], 1))
    }
    report["samples"] = pairs
    return report


@dataclass(frozen=True)
class Interval:
    """Median of ratios and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def interval(ratios: list[list[float]]) -> Interval:
    """Of [starts][turns]."""
    values, draw = np.array(ratios), generator("bootstrap", len(ratios))
    starts, turns = values.shape
    medians = [
        np.median(values[draw.integers(starts, size=(starts, 1)), draw.integers(turns, size=(starts, turns))])
        for _ in range(10_000)
    ]
    return Interval(float(np.median(values)), *map(float, np.percentile(medians, [2.5, 97.5])))


class Worker:
    """One arm in a process of its own."""

    def __init__(self, arm: Callable[[Config, Connection], None], config: Config, name: str) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        folder = config.train.output_dir.with_name(name)
        config = config.model_copy(update={"train": config.train.model_copy(update={"output_dir": folder})})
        self._process = CONTEXT.Process(target=silenced, args=(arm, config, theirs))
        begun = time.perf_counter()
        self._process.start()
        assert self._pipe.recv() == "ready"
        self._peak = self._pipe.recv()[2]
        self.start_seconds = time.perf_counter() - begun

    def turn(self, steps: int) -> tuple[float, ...]:
        """Wall and CPU seconds of so many steps."""
        self._pipe.send(steps)
        wall, cpu, self._peak = self._pipe.recv()
        return wall, cpu

    def finish(self) -> int:
        """Peak resident bytes."""
        self._pipe.send(0)
        self._process.join()
        return int(self._peak)


def silenced(arm: Callable[[Config, Connection], None], config: Config, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    config.train.output_dir.mkdir(parents=True)
    with (config.train.output_dir / "log.txt").open("w", encoding="utf-8") as sys.stderr:
        arm(config, pipe)


def ours(config: Config, pipe: Connection) -> None:
    """`precog train`, paced."""
    from train.loop import train

    train(config, Turns(pipe))


def plain(config: Config, pipe: Connection) -> None:
    """Everything in one: diffusers' modules, its scheduler and its loss, all parts loaded from start to end."""
    import av
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
    from peft import LoraConfig
    from torch.nn import functional
    from transformers import AutoTokenizer, T5EncoderModel

    folder, train, turns = config.model.pretrained_model_name_or_path, config.train, Turns(pipe)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(f"{folder}/text_encoder").requires_grad_(False).eval()
    vae = AutoencoderKLCogVideoX.from_pretrained(f"{folder}/vae").requires_grad_(False).eval()
    transformer = CogVideoXTransformer3DModel.from_pretrained(f"{folder}/transformer").requires_grad_(False)
    scheduler = CogVideoXDPMScheduler.from_pretrained(f"{folder}/scheduler")
    transformer.add_adapter(
        LoraConfig(r=train.lora_rank, lora_alpha=train.lora_alpha, target_modules=list(train.lora_target_modules))
    )
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate)
    root = config.data.instance_data_root
    videos, captions = ((root / name).read_text(encoding="utf-8").split("\n") for name in ("videos.txt", "prompts.txt"))
    posteriors = []
    for video in filter(None, videos):
        with av.open(str(root / video)) as container:
            frames = [
                frame.to_ndarray(format="rgb24")
                for frame, _ in zip(container.decode(video=0), range(FRAMES), strict=False)
            ]
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = functional.interpolate(pixels, (HEIGHT, WIDTH), mode="bicubic", antialias=True)
        with torch.no_grad():
            posteriors.append(vae.encode(pixels.transpose(0, 1)[None]).latent_dist)
    torch.manual_seed(train.seed)
    step = 0
    while True:
        index = step % len(posteriors)
        latents = (posteriors[index].sample() * vae.config.scaling_factor).permute(0, 2, 1, 3, 4)
        tokens = tokenizer(
            captions[index], padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            prompt_embeds = text_encoder(tokens.input_ids)[0]
        noise = torch.randn_like(latents)
        timestep = torch.randint(0, 1000, (1,))
        noisy = scheduler.add_noise(latents, noise, timestep)
        output = transformer(
            hidden_states=noisy, encoder_hidden_states=prompt_embeds, timestep=timestep, return_dict=False
        )[0]
        x0 = scheduler.get_velocity(output, noisy, timestep)
        weight = 1 / (1 - scheduler.alphas_cumprod[timestep])
        loss = (weight.view(-1, 1, 1, 1, 1) * (x0 - latents) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        assert not turns.requested
        optimizer.step()
        optimizer.zero_grad()
        step += 1


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
    """The result of `work` in a process that is gone afterwards, with its memory."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(work, *arguments).result()


def prepare(size: Size, config: Config) -> dict[str, int]:
    """Write the random model and run stage 1; parameters of each part."""
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
    from precompute.plan import Part
    from precompute.run import precompute

    precompute(config, Part(), StopSignal())
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def machine() -> dict[str, str]:
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "cpu": platform.machine(), "threads": "1"}


def table(name: str, report: dict[str, Any]) -> str:
    """The report of one model for people, as Markdown."""
    per_step, peaks = report["seconds_per_step"], {arm: peak / 2**20 for arm, peak in report["peak_rss_bytes"].items()}
    started = report["start_to_first_step_seconds"]
    names = {"starts": "starts", "rounds_per_start": "rounds", "steps_per_turn": "steps"}
    counts = " of ".join(f"{report[key]} {word}" for key, word in names.items())
    rows = [
        f"## {name}: {counts}, one thread\n",
        "| ratio | median | 95 % interval |\n|---|---|---|",
        *(
            f"| {key} | {value['median']:.3f} | {value['low']:.3f} to {value['high']:.3f} |"
            for key, value in report.items()
            if isinstance(value, dict) and "median" in value
        ),
        f"| peak RSS, ours/plain | {report['peak_rss_ratio']:.3f} | |\n",
        f"A ratio nearer to 1 than {report['noise_band']:.3f}, the control's band, says nothing.\n",
        "| | ours | plain |\n|---|---|---|",
        f"| seconds per step | {per_step['ours']:.3f} | {per_step['plain']:.3f} |",
        f"| peak RSS, MiB | {peaks['ours']:.0f} | {peaks['plain']:.0f} |",
        f"| seconds to the first step, last start | {started['ours']:.1f} | {started['plain']:.1f} |\n",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
