"""Tests that written mp4s and contact sheets can be read again."""

from pathlib import Path

import av
import numpy as np

from shared.video import contact_sheet, write_mp4


def test_an_mp4_holds_every_frame_at_its_rate(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 255, (9, 1, 1, 3), dtype=np.uint8), 32, 1).repeat(48, 2)
    path = write_mp4(tmp_path / "clip.mp4", frames, fps=8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 8
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - frames.astype(int)).max() < 16
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_contact_sheet_shows_first_and_last_frame_of_each_video() -> None:
    frames = np.zeros((17, 16, 24, 3), np.uint8)
    frames[0], frames[-1] = 50, 200
    sheet = np.asarray(contact_sheet([("base", frames), ("lora", frames)], columns=4))
    assert sheet.shape[0] == 2 * (14 + 16 + 4)
    for top in (14, 14 + 34):
        assert (sheet[top : top + 16, :24] == 50).all()
        assert (sheet[top : top + 16, 3 * 28 : 3 * 28 + 24] == 200).all()


def test_a_contact_sheet_holds_videos_of_other_sizes() -> None:
    small, large = np.full((1, 16, 24, 3), 50, np.uint8), np.full((9, 32, 16, 3), 200, np.uint8)
    sheet = np.asarray(contact_sheet([("small", small), ("large", large)], columns=4))
    assert sheet.shape == (14 + 16 + 4 + 14 + 32 + 4, 4 * 20, 3)
    assert (sheet[14:30, :24] == 50).all() and (sheet[14:30, 30:] == 255).all()
    assert (sheet[48:80, 60:76] == 200).all()
