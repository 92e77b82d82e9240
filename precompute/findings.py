"""Weaknesses of a data set that stop nothing: captions that T5 does not know, identical captions and clips."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from precompute.discover import Stage, Survey
from precompute.encoders import load_tokenizer
from precompute.probes import Notes
from shared.caption_lint import Tokens, count_tokens, lint_captions
from shared.model.geometry import MAX_CROPPED, cropped_share
from shared.sources.tables import listed


@dataclass(frozen=True, slots=True)
class DataFinding:
    """One kind of weakness and the sources (or prompts) that have it."""

    kind: str
    """That of a `CaptionFinding`, too_long_prompt, identical_clips or much_cropped."""
    message: str
    sources: list[str]
    """In the order of the data set, each once."""

    def __str__(self) -> str:
        return f"{self.message}: {listed(self.sources)}"


def tokens_of(stage: Stage, wanted: Survey, *, publish: bool) -> dict[str, Tokens]:
    """Return prompt key -> tokens of every text; the tokenizer is loaded only if a text is new to the cache."""
    notes = Notes(stage.storage, f"tokens-{wanted.prompts.recipe}")
    notes.refresh()
    new = [key for key in wanted.texts if key not in notes.facts]
    counted = dict[str, Tokens]()
    if new:
        tokenizer = load_tokenizer(str(stage.encoders.tokenizer))
        counted = dict(zip(new, count_tokens(tokenizer, [wanted.texts[key] for key in new]), strict=True))
        if publish:
            notes.publish(counted)
    return {key: counted.get(key) or Tokens(*notes.facts[key]) for key in wanted.texts}


def find_weaknesses(stage: Stage, wanted: Survey, tokens: Mapping[str, Tokens]) -> list[DataFinding]:
    """Return what is weak in the captions of the clips, as encoded, and the clips of equal bytes and window.

    `tokens` is prompt key -> tokens.
    """
    sources = list({id(clip.source): clip.source for clip in wanted.clips}.values())
    captions = [(source.name, caption.text) for source in sources for caption in source.captions]
    length, keys = stage.encoders.conventions.text_length, {text: key for key, text in wanted.texts.items()}
    texts = [text for _, text in captions]
    found = lint_captions(texts, stage.config.data.id_token, [tokens[keys[text]] for text in texts], length)
    findings = [
        DataFinding(
            finding.kind, finding.message, list(dict.fromkeys(captions[number][0] for number in finding.captions))
        )
        for finding in found
    ]
    prompts = (*stage.config.data.validation_prompts, stage.config.data.negative_prompt)
    if long := [text for text in prompts if tokens[keys[text]].total > length]:
        message = f"{len(long)} prompts of [data] are longer than {length} tokens; their ends are cut off"
        findings.append(DataFinding("too_long_prompt", message, long))
    same: dict[str, list[str]] = defaultdict(list)
    for clip in wanted.clips:
        same[clip.key].append(clip.source.name)
    groups = [names for names in same.values() if len(names) > 1]
    if groups:
        count, names = sum(map(len, groups)), list(dict.fromkeys(name for group in groups for name in group))
        message = f"{count} of {len(wanted.clips)} clips are identical to another in bytes and window"
        findings.append(DataFinding("identical_clips", message, names))
    return findings + _much_cropped(wanted, stage.config.data.video_reshape_mode)


def _much_cropped(wanted: Survey, reshape_mode: str) -> list[DataFinding]:
    """Return the clips of which the crop to their bucket takes much."""
    if reshape_mode == "letterbox":
        return []
    shares = {
        clip.source.name: cropped_share(
            clip.probe.height, clip.probe.width, (clip.window.bucket.height, clip.window.bucket.width)
        )
        for clip in wanted.clips
    }
    names = [name for name, share in shares.items() if share > MAX_CROPPED]
    advice = 'add their shape to data.resolution_buckets, or set data.video_reshape_mode = "letterbox"'
    message = f"{len(names)} of {len(shares)} videos lose over {MAX_CROPPED:.0%} of the picture to the crop; {advice}"
    return [DataFinding("much_cropped", message, names)] if names else []
