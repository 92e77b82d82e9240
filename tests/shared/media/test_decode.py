"""A window is decoded from a keyframe before it where that is exact, and gives the bytes of decoding from the start."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from shared.media import decode
from shared.media import probe as video
from shared.media.probe import Probed, VideoError, probe
from tests import media

FILES = {
    "h264.mp4": True,
    "h264.mkv": True,
    "h264_gop_1.mp4": True,
    "h264_fragments.mp4": True,
    "h264_interlaced.mp4": True,
    "hevc_open_gop.mp4": True,
    "vp9.webm": True,
    "av1.mp4": True,
    "h264_open_gop.mp4": False,
    "mpeg4.mp4": False,
    "h264.ts": False,
}
"""Whether late windows of it need not be decoded from the start: x264 opens its only IDR picture there."""


class Watch:
    """The number of pictures decoded after a seek, and of decodings from the start."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pictures = self.from_the_start = 0
        check_frame, displayed = video.check_frame, video.displayed

        def counted_frame(*arguments: Any) -> None:
            self.pictures += 1
            check_frame(*arguments)

        def counted_start(*arguments: Any) -> Any:
            self.from_the_start += 1
            return displayed(*arguments)

        patch.setattr(decode, "check_frame", counted_frame)
        patch.setattr(decode, "displayed", counted_start)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def check_windows(path: Path, found: Probed, step: int = 1) -> None:
    """Windows with gaps and repeats equal the whole decoded from the start."""
    count = found.probe.num_frames
    whole = media.decode_probed(path, found, range(count))[0]
    for first in range(1, count, step):
        indices = [index for index in (first, first, first + 1, first + 5) if index < count]
        assert np.array_equal(media.decode_probed(path, found, indices)[0], whole[indices]), first


@pytest.mark.parametrize("file", FILES)
def test_every_window_has_the_bytes_of_decoding_from_the_start(file: str, folder: Path, watch: Watch) -> None:
    path = media.write_case(folder, file)
    check_windows(path, probe(path), 1 if FILES[file] else 9)
    assert watch.from_the_start < 16 if FILES[file] else watch.from_the_start > 2  # 12 pictures are the first group


def test_a_variable_rate_a_turn_and_an_edit_list_keep_their_bytes(folder: Path) -> None:
    times = [index * 33 + (index % 5) * 7 for index in range(30)]
    source = media.clip(folder, "long.mp4", frames=60)
    for path in (
        media.clip(folder, "vfr.mp4", times=times),
        media.clip(folder, "turned.mp4", rotation=90),
        media.write_trimmed(folder / "trimmed.mp4", source, hidden=19),
        media.write_trimmed(folder / "cut.mkv", source, hidden=0, first_packet=12),
    ):
        check_windows(path, probe(path), 3)


@pytest.mark.parametrize(("codec", "frames"), [("libx264", 400), ("libx265", 100)])
def test_a_late_window_costs_no_more_than_an_early_one(codec: str, frames: int, folder: Path, watch: Watch) -> None:
    path = media.clip(folder, f"long_{frames}.mp4", codec=codec, frames=frames)
    found = probe(path)
    for first in (30, frames // 2, frames - 20):
        watch.pictures = 0
        media.decode_probed(path, found, range(first, first + 9))
        assert 9 <= watch.pictures <= 12 + 9
    assert watch.from_the_start == 0


@pytest.mark.parametrize("file", ["h264.mp4", "hevc_open_gop.mp4", "av1.mp4"])
def test_false_keyframes_of_a_container_are_not_decoded_from(file: str, folder: Path) -> None:
    source = media.write_case(folder, file)
    data = source.read_bytes()
    assert data.count(b"stss") == 1
    path = folder / f"lying_{file}"
    path.write_bytes(data.replace(b"stss", b"free"))  # ISO 14496-12, 8.6.2: without it every sample is a sync sample
    found = probe(path)
    assert found.probe.one_to_one
    check_windows(path, found, 2)


def test_a_picture_that_is_refreshed_bit_by_bit_is_no_place_to_begin(folder: Path, watch: Watch) -> None:
    path = media.clip(folder, "refreshed.mp4", frames=60, bframes=0, options={"intra-refresh": "1"})
    found = probe(path)
    assert found.probe.one_to_one
    check_windows(path, found, 4)
    assert watch.from_the_start >= 12


def test_damage_matters_within_a_window_and_not_before_it(folder: Path, tmp_path: Path) -> None:
    source = media.clip(folder, "h264.mp4")
    whole = media.decode_probed(source, probe(source), range(30))[0]
    with av.open(str(source)) as reader:
        damaged = [packet for packet in reader.demux(video=0) if packet.size][15]
        assert damaged.pos is not None
        place, size = damaged.pos, damaged.size
    data = bytearray(source.read_bytes())
    data[place + 5 : place + size] = bytes(byte ^ 0x5A for byte in data[place + 5 : place + size])
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    found = probe(path)
    assert np.array_equal(media.decode_probed(path, found, [25, 27])[0], whole[[25, 27]])
    with pytest.raises(VideoError):
        media.decode_probed(path, found, [22])


def test_a_disk_that_fails_after_the_seek_is_no_bad_video(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media.clip(folder, "h264.mp4")
    found = probe(path)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(decode, "check_frame", fail)
    with pytest.raises(VideoError, match="cannot be read: Input/output error") as error:
        media.decode_probed(path, found, [20])
    assert not error.value.permanent
