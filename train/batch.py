"""One optimizer step's clips, read in the background one step ahead."""

from dataclasses import dataclass

from train.data.example import Example
from train.data.order import divide, global_batch
from train.run import Run


@dataclass(frozen=True, slots=True)
class Work:
    """As this rank runs it; all but `packs` is of the global batch."""

    packs: list[list[Example]]
    tokens: int
    num_packs: int
    clips: list[str]
    """Keys of the latents, in order."""
    timesteps: list[int]


def read_work(run: Run, step: int) -> Work:
    """Cut the global batch of optimizer step `step` (from 0) into packs, read this rank's, bring them to its device."""
    train, accelerator, dataset = run.config.train, run.accelerator, run.dataset
    draws = global_batch(run.view.hash, train.seed, len(dataset.rows), train.global_batch_size, step, run.windows)
    timesteps = dataset.timesteps(draws, step)
    tokens = [dataset.tokens(draw.row) for draw in draws]
    ranks = divide(tokens, run.width, accelerator.num_processes, train.max_tokens_per_pack)
    packs = [
        [
            dataset.example(draws[index], timesteps[index]).to(accelerator.device, run.transformer.dtype)
            for index in pack
        ]
        for pack in ranks[accelerator.process_index]
    ]
    clips = [dataset.rows[draw.row].latent_key for draw in draws]
    return Work(packs, sum(tokens), sum(map(len, ranks)), clips, timesteps)
