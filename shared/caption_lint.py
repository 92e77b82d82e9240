"""Checks on captions before anything is encoded: what is empty, repeated, missing, or lost in the tokenizer."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TEXT_LENGTH = 226
"""Tokens that CogVideoX encodes, the end token included (`max_text_seq_length` in diffusers' configs)."""
COMMON_SHARE = 0.8
"""A beginning that more captions than this share have is reported."""
COMMON_WORDS = 3
"""Words of the shortest beginning that is reported, such as "the video shows"."""


TEXTS_PER_BLOCK = 250
"""Texts tokenized at once to count their tokens; a text of 150 words takes 0.2 MB."""


@dataclass(frozen=True, slots=True)
class CaptionFinding:
    """One kind of weakness and the captions that have it."""

    kind: str
    """empty, identical, trigger_missing, trigger_repeated, common_prefix, too_long, unknown_tokens or non_latin."""
    captions: tuple[int, ...]
    """Positions in the list of captions, ascending."""
    message: str
    """One line."""


def with_trigger(trigger: str, caption: str) -> str:
    """Return the caption as stage 1 encodes it: the trigger (`data.id_token`) in front, with one space."""
    return f"{trigger.strip()} {caption.strip()}".strip()


class Tokens(NamedTuple):
    """A text as T5's tokenizer reads it."""

    total: int
    unknown: int
    """Tokens that stand for text that T5 does not know."""
    kept: int
    """Letters that come back from the tokens, if some are unknown."""


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """Count the tokens of each text, the end token included; `tokenizer` is the T5 tokenizer of transformers."""
    found: list[Tokens] = []
    for start in range(0, len(texts), TEXTS_PER_BLOCK):
        block = tokenizer(list(texts[start : start + TEXTS_PER_BLOCK]), return_attention_mask=False, verbose=False)
        for ids in block.input_ids:
            unknown = ids.count(tokenizer.unk_token_id)
            kept = len("".join(tokenizer.decode(ids, skip_special_tokens=True).split())) if unknown else 0
            found.append(Tokens(len(ids), unknown, kept))
    return found


def lint_captions(
    captions: Sequence[str], trigger: str, tokens: Sequence[Tokens] | None, text_length: int = TEXT_LENGTH
) -> list[CaptionFinding]:
    """Return what is weak in `captions` as encoded, the trigger included; an empty trigger is not looked for.

    `tokens` are those of the captions. Without them, text outside the Latin script is reported in place of unknown
    tokens, and no caption is measured against `text_length` tokens.
    """
    trigger = trigger.strip()
    texts = [" ".join(caption.split()) for caption in captions]
    bodies = [text.removeprefix(trigger).strip() for text in texts]
    filled = [number for number, body in enumerate(bodies) if body]
    found: dict[str, tuple[list[int], str]] = {
        "empty": ([number for number, body in enumerate(bodies) if not body], "are empty"),
        "identical": (_identical(texts, filled), "are identical to another"),
    }
    if trigger:
        missing = [number for number in filled if trigger not in texts[number]]
        repeated = [number for number in filled if texts[number].count(trigger) > 1]
        found["trigger_missing"] = missing, f"do not have the trigger {trigger!r}"
        found["trigger_repeated"] = repeated, f"have the trigger {trigger!r} more than once"
    prefix, common = _common_prefix({number: bodies[number].casefold().split() for number in filled})
    found["common_prefix"] = common, f"begin with {prefix!r}, which a model learns as part of the concept"
    if tokens is None:
        foreign = [number for number in filled if any(map(_is_foreign, texts[number]))]
        found["non_latin"] = foreign, "have letters outside the Latin script or emoji, which T5 does not know"
    else:
        lost = {number: beyond for number in filled if (beyond := tokens[number].total - text_length) > 0}
        longest = max(lost.values(), default=0)
        found["too_long"] = list(lost), f"are longer than {text_length} tokens; up to {longest} are cut off"
        affected = [number for number in filled if tokens[number].unknown]
        count = sum(tokens[number].total for number in affected)
        share = sum(tokens[number].unknown for number in affected) / max(1, count)
        kept = sum(tokens[number].kept for number in affected)
        letters = sum(len("".join(texts[number].split())) for number in affected)
        lost_share = max(0.0, 1 - kept / max(1, letters))
        found["unknown_tokens"] = (
            affected,
            f"have text that T5 does not know: {share:.0%} of their tokens, {lost_share:.0%} of their characters",
        )
    return [
        CaptionFinding(kind, tuple(numbers), f"{len(numbers)} of {len(texts)} captions {words}")
        for kind, (numbers, words) in found.items()
        if numbers
    ]


def _identical(texts: Sequence[str], filled: Sequence[int]) -> list[int]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number in filled:
        groups[texts[number].casefold()].append(number)
    return sorted(number for group in groups.values() if len(group) > 1 for number in group)


def _common_prefix(words: dict[int, list[str]]) -> tuple[str, list[int]]:
    """Return the longest beginning that enough captions have, and these captions."""
    best: tuple[str, list[int]] = "", []
    for length in range(COMMON_WORDS, max(map(len, words.values()), default=0) + 1):
        starts = {number: " ".join(found[:length]) for number, found in words.items() if len(found) >= length}
        prefix, count = Counter(starts.values()).most_common(1)[0]
        if count <= max(2, COMMON_SHARE * len(words)):
            break
        best = prefix, [number for number, start in starts.items() if start == prefix]
    return best


def _is_foreign(character: str) -> bool:
    """Return True for letters of other scripts, and for symbols beyond Latin-1 such as emoji."""
    if character.isalpha():
        return not unicodedata.name(character, "").startswith(("LATIN", "FEMININE", "MASCULINE"))
    return character > "\xff" and unicodedata.category(character) == "So"
