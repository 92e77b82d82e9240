"""Whether the cache comes from this config's settings and this checkpoint's VAE, T5 and tokenizer.

It is found out without reading their weights.
"""

from collections.abc import Iterator
from typing import Any

from shared.cache.settings import stale_settings
from shared.cache.view import View
from shared.config import Config
from shared.errors import CacheError
from shared.fingerprint import sha256_file
from shared.model.pretrained import Part, present_folder, present_part

Recipe = dict[str, Any]
NAMES = {"vae": "VAE", "text_encoder": "T5"}


def check_cache(config: Config, view: View, latents: Recipe, prompts: Recipe) -> None:
    """Raises `CacheError` for the first of `cache_problems`."""
    for problem in cache_problems(config, view, latents, prompts):
        raise CacheError(problem)


def cache_problems(config: Config, view: View, latents: Recipe, prompts: Recipe) -> Iterator[str]:
    """One line for all that the config's view is not made with: other settings first, then other encoders."""
    yield from stale_settings(config, view, latents, prompts)
    yield from other_encoders(config, view, latents, prompts)


def other_encoders(config: Config, view: View, latents: Recipe, prompts: Recipe) -> Iterator[str]:
    """One line for each part of the checkpoint that did not make the view's samples, whose recipes these are.

    A part that this machine does not have is no problem, and nothing is downloaded. Weight files are as they were when
    their sizes and times are those of the view; else, as on another machine, they are hashed (a hub file's name is its
    hash).
    """
    made_by = {"vae": latents["vae"], "text_encoder": prompts["text_encoder"]}
    for name, recipe in made_by.items():
        part = present_part(config.model, name)
        if part is not None and (problem := _difference(part, recipe, view.encoders.get(name, ()))):
            yield f"view {view.name}: the cache was made with another {NAMES[name]} than {part.folder}: {problem}"
    tokenizer = present_folder(config.model, "tokenizer")
    for name, sha256 in prompts["tokenizer"].items():
        if tokenizer is not None and (tokenizer / name).is_file() and sha256_file(tokenizer / name) != sha256:
            yield f"view {view.name}: the cache was made with another tokenizer than {tokenizer}: {name} differs"


def _difference(part: Part, recipe: Recipe, marks: tuple[tuple[int, int], ...]) -> str | None:
    """What differs, and what to do; None if nothing does."""
    advice = "run `precog precompute` with this config, or train with the checkpoint that made the cache"
    theirs, ours = recipe["config"], part.settings
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            return f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}; {advice}"
    if part.marks == marks or part.sha256() == recipe["weights"]:
        return None
    return f"the weights differ; {advice}"
