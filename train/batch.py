"""The clips of one optimizer step, read one step ahead."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from train.data.example import Example
from train.data.order import Draw, Packs, divide, global_batch
from train.run import Run


@dataclass(frozen=True, slots=True)
class Batch:
    """The packs of this rank, and numbers of the global batch."""

    packs: list[list[Example]]
    """This rank's packs, on its device."""
    tokens: int
    num_packs: int
    clips: list[str]
    """Keys of the latents, in order."""
    timesteps: list[int]


def plan_batch(run: Run, step: int) -> tuple[tuple[Draw, ...], list[int], tuple[Packs, ...]]:
    """Return draws, tokens per clip and each rank's packs of optimizer step `step` (from 0); nothing is read."""
    train, dataset = run.config.train, run.dataset
    draws = global_batch(run.view.hash, train.seed, len(dataset.rows), train.global_batch_size, step, run.windows)
    tokens = [dataset.tokens(draw.row) for draw in draws]
    return draws, tokens, divide(tokens, run.width, run.accelerator.num_processes, train.max_tokens_per_pack)


def read_batch(run: Run, step: int) -> Batch:
    """Read this rank's packs of optimizer step `step` (from 0) and copy them to its device."""
    dataset, accelerator = run.dataset, run.accelerator
    draws, tokens, ranks = plan_batch(run, step)
    timesteps = dataset.timesteps(draws, step)
    packs = [
        [
            dataset.example(draws[index], timesteps[index]).to(accelerator.device, run.transformer.dtype)
            for index in pack
        ]
        for pack in ranks[accelerator.process_index]
    ]
    clips = [dataset.rows[draw.row].latent_key for draw in draws]
    return Batch(packs, sum(tokens), sum(map(len, ranks)), clips, timesteps)


def prefetch_batches(run: Run, first_step: int) -> Generator[Batch, None, None]:
    """Yield the batches from `first_step` to the end of the run; the next one is read while one is in use."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = [reader.submit(read_batch, run, first_step)] if first_step < run.num_steps else []
        while upcoming:
            batch = upcoming.pop().result()
            first_step += 1
            if first_step < run.num_steps:
                upcoming.append(reader.submit(read_batch, run, first_step))
            yield batch
