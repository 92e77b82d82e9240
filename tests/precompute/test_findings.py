"""Weaknesses of a data set that stop nothing are named by plan and precompute."""

import shutil
from pathlib import Path

from precompute.discover import open_stage
from precompute.estimate import estimate
from shared.media.pool import decode_pool
from tests.corpus import config_for, run, write_captions, write_corpus


def test_unknown_text_and_identical_clips_are_named_with_their_share(pipeline: Path, tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "clips", 3)
    shutil.copy(root / "000.mp4", root / "003.mp4")
    write_captions(root, ["a rabbit", "一只橘猫在草地上奔跑", "a  rabbit", "a bird glides"])
    config = config_for(pipeline, root, tmp_path / "cache")
    with decode_pool(config.precompute) as pool:
        planned = estimate(open_stage(config), pool)
    found = {finding.kind: finding for finding in planned.findings}
    assert found.keys() == {"identical", "unknown_tokens", "identical_clips", "much_cropped"}
    assert found["identical"].sources == ["000.mp4", "002.mp4"]
    assert found["unknown_tokens"].sources == ["001.mp4"]
    assert "1 of 4 captions have text that T5 does not know: " in found["unknown_tokens"].message
    assert "100% of their characters" in found["unknown_tokens"].message
    assert str(found["identical_clips"]) == (
        "2 of 4 clips are identical to another in bytes and window: '000.mp4', '003.mp4'"
    )
    report = run(config)
    assert report.as_json()["findings"] == planned.as_json()["findings"]
    assert [finding["kind"] for finding in report.as_json()["findings"]] == list(found)


def test_clips_that_the_crop_takes_much_of_are_named(pipeline: Path, tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "clips", 2)
    cropped = (
        "2 of 2 videos lose over 20% of the picture to the crop; add their shape to data.resolution_buckets, or set "
        "data.video_reshape_mode = \"letterbox\": '000.mp4', '001.mp4'"
    )
    for given, expected in ({}, [cropped]), ({"video_reshape_mode": "letterbox"}, []):
        config = config_for(pipeline, root, tmp_path / "cache", data=given)
        with decode_pool(config.precompute) as pool:
            findings = estimate(open_stage(config), pool).findings
        assert [str(finding) for finding in findings if finding.kind == "much_cropped"] == expected
