"""The lint of captions finds each weakness, alone and where it is."""

from collections.abc import Sequence

import pytest

from shared.caption_lint import CaptionFinding, count_tokens, lint_captions, with_trigger
from tests.tiny import build_tokenizer

SOUND = ("a grey rabbit yawns", "the camera pans across a forest", "two children fly a red kite at dusk")


def kinds(findings: Sequence[CaptionFinding]) -> dict[str, tuple[int, ...]]:
    return {finding.kind: finding.captions for finding in findings}


@pytest.mark.parametrize(
    ("captions", "trigger", "found"),
    [
        (SOUND, "", {}),
        ([with_trigger("sks dog", text) for text in SOUND], "sks dog", {}),
        ((*SOUND, " ", ""), "", {"empty": (3, 4)}),
        (("sks", *SOUND), "sks", {"empty": (0,), "trigger_missing": (1, 2, 3)}),
        ((*SOUND, "A grey  rabbit yawns"), "", {"identical": (0, 3)}),
        (("sks a sks dog", "sks dog"), "sks", {"trigger_repeated": (0,)}),
        ((*SOUND, "一只灰色的兔子", "a rabbit \N{RABBIT FACE}", "ein müder Hase, 5 °C"), "", {"non_latin": (3, 4)}),
        ([f"The video shows {text}" for text in SOUND], "", {"common_prefix": (0, 1, 2)}),
        ([f"sks The video shows {text}" for text in SOUND], "sks", {"common_prefix": (0, 1, 2)}),
        (["the video shows a", "the video shows b", *SOUND], "", {}),
        ([], "", {}),
    ],
)
def test_each_weakness_is_found_where_it_is(
    captions: Sequence[str], trigger: str, found: dict[str, tuple[int, ...]]
) -> None:
    assert kinds(lint_captions(captions, trigger, None)) == found


def test_the_longest_common_beginning_is_named() -> None:
    findings = lint_captions([f"The video shows a man who {word}" for word in ("sits", "runs", "eats")], "", None)
    assert findings[0].message.startswith("3 of 3 captions begin with 'the video shows a man who'")


def test_a_tokenizer_counts_what_is_cut_off_and_unknown() -> None:
    tokenizer = build_tokenizer(16)
    long = "a grey rabbit yawns in the meadow " * 4
    captions = [SOUND[0], long, "a grey 兔子"]
    findings = lint_captions(captions, "", count_tokens(tokenizer, captions), 16)
    assert kinds(findings) == {"too_long": (1,), "unknown_tokens": (2,)}
    num_tokens = len(tokenizer(long.strip(), truncation=False)["input_ids"])
    assert findings[0].message == f"1 of 3 captions are longer than 16 tokens; up to {num_tokens - 16} are cut off"
    ids = tokenizer("a grey 兔子")["input_ids"]
    assert f"{ids.count(tokenizer.unk_token_id) / len(ids):.0%} of their tokens" in findings[1].message
