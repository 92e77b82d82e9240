"""Frames are exact or refused: bar-coded clips of every kind through both decoders, and files that are no clips."""

import errno
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from shared import regular_files
from shared.media import probe as video
from shared.media.decode import Requested, choose_decoder
from shared.media.probe import Probed, VideoError, parse_probe, probe
from tests import media
from tests.media import Case


def decode_all(path: Path, decoder: Requested = "pyav") -> tuple[Probed, np.ndarray]:
    found = probe(path)
    return found, media.decode_probed(path, found, range(len(found.timestamps_us)), decoder)[0]


@contextmanager
def transient(reason: str) -> Iterator[None]:
    """Expect a transient failure with a reason that contains `reason`."""
    with pytest.raises(VideoError, match=reason) as error:
        yield
    assert not error.value.permanent


def reason_against(path: Path) -> str:
    """Why the whole file cannot be had, from the probe or from decoding."""
    with pytest.raises(VideoError) as error:
        decode_all(path)
    assert error.value.permanent and "\n" not in error.value.reason and 0 < len(error.value.reason) <= 200
    return error.value.reason


@pytest.mark.parametrize("case", media.CASES, ids=str)
def test_frames_are_exact_and_timed_and_equal_for_both_decoders(case: Case, folder: Path) -> None:
    path = media.write_case(folder, case)
    found, frames = decode_all(path)
    count = case.settings.get("frames", 30)
    assert media.indices_of(frames) == list(range(count))
    size = case.settings.get("height", 48), case.settings.get("width", 80)
    assert (found.probe.height, found.probe.width) == size == frames.shape[1:3] and frames.dtype == np.uint8
    exact = [round(Fraction(index * 1_000_000, case.rate)) for index in range(count)]
    assert max(abs(a - b) for a, b in zip(exact, found.timestamps_us, strict=True)) <= case.tick // 2 + 1

    indices = sorted({0, count // 4, count // 2, count - 1})
    picked, decoder = media.decode_probed(path, found, [*indices, count - 1], "auto")
    assert np.array_equal(picked, frames[[*indices, count - 1]])
    assert decoder == choose_decoder(found.probe, "auto") or not case.decord
    if case.decord:
        picked, decoder = media.decode_probed(path, found, [*indices, count - 1], "decord")
        assert decoder == "decord" and np.array_equal(picked, frames[[*indices, count - 1]])
    else:
        with pytest.raises(VideoError, match="decord is not exact here"):
            media.decode_probed(path, found, range(count), "decord")


def test_auto_takes_decord_only_for_files_that_pyav_found_intact(folder: Path) -> None:
    decoded_whole = probe(media.clip(folder, "mpeg4.avi", codec="mpeg4", bframes=0))
    packets_counted = probe(media.clip(folder, "h264.mp4"))
    assert (decoded_whole.probe.intact, choose_decoder(decoded_whole.probe, "auto")) == (True, "decord")
    assert (packets_counted.probe.intact, choose_decoder(packets_counted.probe, "auto")) == (False, "pyav")
    assert choose_decoder(packets_counted.probe, "decord") == "decord"
    assert choose_decoder(decoded_whole.probe, "pyav") == "pyav"


def test_a_variable_rate_keeps_its_time_stamps(folder: Path) -> None:
    times = [index * 33 + (index % 5) * 7 for index in range(30)]
    found, frames = decode_all(media.clip(folder, "vfr.mp4", times=times))
    assert found.timestamps_us.tolist() == [time * 1000 for time in times]
    assert media.indices_of(frames) == list(range(30))
    assert np.array_equal(decode_all(folder / "vfr.mp4", "decord")[1], frames)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_pictures_hidden_by_an_edit_list_do_not_count(codec: str, folder: Path) -> None:
    source = media.clip(folder, f"long_{codec}.mp4", codec=codec, frames=40, gop=20)
    path = media.write_trimmed(folder / f"trimmed_{codec}.mp4", source, hidden=7)
    found, frames = decode_all(path)
    assert media.indices_of(frames) == list(range(7, 40))
    assert found.timestamps_us[:3].tolist() == [0, 33333, 66667]
    with pytest.raises(VideoError, match="it counts 40 frames, PyAV 33"):
        decode_all(path, "decord")


def test_pictures_whose_keyframe_was_cut_away_do_not_count(folder: Path) -> None:
    source = media.clip(folder, "open_gop_60.mp4", open_gop=True, frames=60)
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keyframe = [number for number, packet in enumerate(packets) if packet.is_keyframe][2]
    path = media.write_trimmed(folder / "cut.mp4", source, hidden=0, first_packet=keyframe)
    with av.open(str(path)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert min(times) < times[0], "the clip has no leading pictures"
    found, frames = decode_all(path)
    assert found.probe.intact and len(frames) < len(times)
    assert media.indices_of(frames) == list(range(60 - len(frames), 60))


def test_pictures_before_the_first_keyframe_do_not_count(folder: Path) -> None:
    source = media.clip(folder, "without_b.mp4", bframes=0)
    path = media.write_trimmed(folder / "from_3.mp4", source, hidden=0, first_packet=3)
    found, frames = decode_all(path)
    assert found.probe.intact and found.timestamps_us[0] == 0
    assert media.indices_of(frames) == list(range(12, 30))


@pytest.mark.parametrize(("file", "codec"), [("twice.mkv", "libx264"), ("twice-ffv1.mkv", "ffv1")])
def test_frames_that_share_a_time_are_decoded_from_the_start(file: str, codec: str, folder: Path) -> None:
    path = media.clip(folder, file, codec=codec, frames=6, bframes=0, times=[0, 40, 80, 80, 120, 160])
    found, frames = decode_all(path)
    assert found.timestamps_us.tolist() == [0, 40_000, 80_000, 80_000, 120_000, 160_000]
    assert not found.probe.one_to_one
    assert media.indices_of(frames) == list(range(6))
    assert media.indices_of(media.decode_probed(path, found, [3, 4])[0]) == [3, 4]


def test_all_eight_display_matrices_are_applied_and_a_slanted_one_is_refused(folder: Path) -> None:
    data = bytearray(media.clip(folder, "plain_5.mp4", frames=5).read_bytes())
    plain = decode_all(folder / "plain_5.mp4")[1][0]
    rows, columns = np.mgrid[: plain.shape[0], : plain.shape[1]]
    path = folder / "matrix.mp4"
    turns = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 0, -1)]
    for matrix in (*turns, (0, -1, -1, 0), (0.75, 0.5, -0.5, 0.75)):
        # ISO 14496-12, 8.3.2: version 0 `tkhd` has its 3x3 matrix 40 bytes after its type; 16.16 fixed point.
        start = data.index(b"tkhd") + 44
        for place, value in zip((0, 1, 3, 4), matrix, strict=True):
            data[start + 4 * place : start + 4 * place + 4] = int(value * 65536).to_bytes(4, "big", signed=True)
        path.write_bytes(data)
        if not isinstance(matrix[0], int):
            assert reason_against(path) == "its display matrix is not a rotation by quarter turns"
            continue
        a, b, c, d = matrix  # a point (x, y) is shown at (ax + cy, bx + dy)
        right, down = a * columns + c * rows, b * columns + d * rows
        shown = np.empty((np.ptp(down) + 1, np.ptp(right) + 1, 3), np.uint8)
        shown[down - down.min(), right - right.min()] = plain
        found, frames = decode_all(path)
        assert np.array_equal(frames[0], shown), matrix
        assert (found.probe.height, found.probe.width) == shown.shape[:2]
        if matrix != (1, 0, 0, 1):
            with pytest.raises(VideoError, match="decord is not exact here: its pictures are not shown as they are st"):
                decode_all(path, "decord")


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_images_stand_as_their_exif_says(extension: str, tmp_path: Path) -> None:
    stripes = np.repeat(np.arange(0, 96, dtype=np.uint8)[None] * 2, 64, 0)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = orientation, "a phone's"
        path = tmp_path / f"{orientation}.{extension}"
        Image.fromarray(np.stack([stripes, stripes.T[:64, :64].repeat(2, 1)[:, :96], stripes], 2)).save(path, exif=exif)
        _, (frame,) = decode_all(path)
        with Image.open(path) as image:
            upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.int16)
        assert frame.shape == upright.shape and np.abs(frame - upright).max() <= 8


@pytest.mark.parametrize("file", ["moov_first.mp4", "h264.mkv", "vp9.webm", "h264.ts"])
def test_a_truncated_file_gives_its_first_frames_or_nothing(file: str, folder: Path) -> None:
    moov_first = file == "moov_first.mp4"
    source = media.clip(folder, file, muxer={"movflags": "faststart"}) if moov_first else media.write_case(folder, file)
    exact = 0
    for step in range(1, 10, 2):
        path = folder / f"cut_{file}"
        path.write_bytes(source.read_bytes()[: source.stat().st_size * step // 10])
        try:
            frames = decode_all(path)[1]
        except VideoError:
            continue
        # Without a checksum a picture whose end is missing may pass in VP9; every other must be right.
        assert media.indices_of(frames)[:-1] == list(range(len(frames) - 1))
        exact += 1
    assert exact or file in ("moov_first.mp4", "h264.ts")


@pytest.mark.parametrize("file", ["h264.mp4", "hevc_open_gop.mp4", "mpeg4.avi", "h264.ts", "vp9.webm"])
def test_damaged_bytes_give_frames_or_a_reason_and_never_two_answers(file: str, folder: Path) -> None:
    source = media.write_case(folder, file)
    refused = 0
    for seed in range(8):
        path = media.write_flipped(folder / f"flipped_{file}", source, flips=1 + seed % 8, seed=seed)
        try:
            found, frames = decode_all(path)
        except VideoError:
            refused += 1
            with pytest.raises(VideoError):
                decode_all(path, "decord")
            continue
        for decoder in ("auto", "decord"):
            try:
                assert np.array_equal(media.decode_probed(path, found, range(len(frames)), decoder)[0], frames)
            except VideoError:
                assert decoder == "decord"
    assert refused > 0


def test_files_that_are_no_videos_are_refused_with_one_line(tmp_path: Path, folder: Path) -> None:
    good = media.clip(folder, "h264.mp4")
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "circle.mp4").symlink_to("circle.mp4")
    data = good.read_bytes()
    contents = {"zeros": bytes(4096), "empty": b"", "no_moov": data[: data.index(b"moov") - 4]}
    for name, content in contents.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
    expected = {
        **{tmp_path / f"{name}.mp4": "not a video" for name in contents},
        media.write_text(tmp_path / "text.mp4"): "not a video",
        media.write_audio(tmp_path / "audio.mp4"): "no moving pictures",
        media.write_audio(tmp_path / "audio.mkv"): "no moving pictures",
        tmp_path / "fifo.mp4": "not a regular file",
        tmp_path / "folder.mp4": "not a regular file",
        Path("/dev/null"): "not a regular file",
        tmp_path / "circle.mp4": "cannot open: Too many levels of symbolic links",
        tmp_path / "nul\0.mp4": "cannot open",
    }
    for path, reason in expected.items():
        assert reason in reason_against(path), path


def test_a_playlist_under_a_videos_name_opens_no_other_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # where a list without a folder of its own looks
    target = media.write_clip(tmp_path / "other.mp4", frames=5)
    path = tmp_path / "innocent.mp4"
    path.write_text(f"ffconcat version 1.0\nfile {target.name}\n", "utf-8")
    with path.open("rb") as file, av.open(file, "r") as container:
        assert len(list(container.decode(video=0))) == 5, "the attack has lost its teeth"
    assert "not a video" in reason_against(path)
    hls = tmp_path / "hls.mp4"
    hls.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n", "utf-8")
    assert "not a video" in reason_against(hls)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as out:
        sound: Any = out.add_stream("aac", rate=16000)
        cover: Any = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 80, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame.from_ndarray(media.draw(1, 48, 80), format="rgb24")))
        out.mux(cover.encode(None))
        media.write_sound(out, sound, 0.5)
    assert "no moving pictures" in reason_against(path)


def test_a_file_that_is_not_to_be_had_is_no_bad_video(tmp_path: Path, folder: Path) -> None:
    path = media.renamed(tmp_path / "clip.mp4", media.clip(folder, "h264.mp4"))
    found = probe(path)
    path.unlink()
    for read in (lambda: probe(path), lambda: media.decode_probed(path, found, [0], "pyav")):
        with transient("cannot open: No such file"):
            read()


class FailingFile(FileIO):
    """A file on a disk that fails: every read but the first few."""

    good_reads = 0

    def _fail(self) -> None:
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads > FailingFile.good_reads:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(self, size: int | None = -1) -> bytes:
        self._fail()
        return super().read(size)

    def readinto(self, buffer: Any) -> int:
        self._fail()
        return super().readinto(buffer) or 0


@pytest.mark.parametrize("file", ["h264.mp4", "mpeg4.avi"])
def test_a_disk_that_fails_is_no_bad_video(file: str, folder: Path, monkeypatch: Any) -> None:
    path = media.write_case(folder, file)
    found = probe(path)
    monkeypatch.setattr(regular_files, "FileIO", FailingFile)
    for good_reads in (0, 2):
        monkeypatch.setattr(FailingFile, "good_reads", good_reads)
        with transient("cannot be read: Input/output error"):
            probe(path)
    monkeypatch.setattr(FailingFile, "good_reads", 0)
    with transient("cannot be read: Input/output error"):
        media.decode_probed(path, found, [0, 29], "pyav")


def test_other_bytes_of_equal_size_and_time_are_refused_and_equal_bytes_not(tmp_path: Path, folder: Path) -> None:
    path = media.renamed(tmp_path / "clip.mp4", media.clip(folder, "h264.mp4"))
    found = probe(path)
    content, status = path.read_bytes(), path.stat()
    other = bytearray(content)
    other[-1] ^= 1
    for data in (bytes(other), content):
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if data == content:
            assert media.indices_of(media.decode_probed(path, found, [5], "pyav")[0]) == [5]
        else:
            with transient("changed after it was probed"):
                media.decode_probed(path, found, [5], "pyav")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, folder: Path, monkeypatch: Any) -> None:
    path = media.renamed(tmp_path / "clip.mp4", media.clip(folder, "h264.mp4"))
    demuxer = video.demuxer

    def rewriting(file: FileIO) -> Any:
        path.write_bytes(b"x" * 10_000)
        return demuxer(file)

    monkeypatch.setattr(video, "demuxer", rewriting)
    with transient("changed while it was read"):
        probe(path)


def test_a_picture_of_another_turn_or_size_than_probed_is_refused(folder: Path) -> None:
    path = media.clip(folder, "h264.mp4")
    found = probe(path)
    changed = {"rotation": 180, "mirrored": True, "stored": (50, 80), "aspect": (4, 3), "colors": (16, 9)}
    for name, value in changed.items():
        reason = "the rotation changes" if name in ("rotation", "mirrored") else "the frame size changes"
        reason = "the transfer curve or the primaries change" if name == "colors" else reason
        fields = asdict(found.probe)
        other = replace(found, probe=parse_probe(fields | {"look": fields["look"] | {name: value}}))
        for index in (0, 20):  # from the start, and from a keyframe
            with pytest.raises(VideoError, match=rf"^{reason}: at frame {index}$"):
                media.decode_probed(path, other, [index])


def test_other_times_or_fewer_frames_than_probed_are_refused(folder: Path) -> None:
    path = media.clip(folder, "h264.mp4")
    found = probe(path)
    expected: dict[Requested, tuple[int, str]] = {
        "pyav": (700, "frame 5 comes at another time"),
        "decord": (2000, "decord is not exact here: its frame times differ from PyAV's"),
    }
    for decoder, (microseconds, reason) in expected.items():
        times = array("q", (time + microseconds for time in found.timestamps_us))
        later = Probed(replace(found.probe, intact=True), times)
        with pytest.raises(VideoError, match=reason):
            media.decode_probed(path, later, [5], decoder)
    longer = Probed(replace(found.probe, num_frames=31), found.timestamps_us + array("q", [1_000_000]))
    for decoder in ("pyav", "auto", "decord"):
        with pytest.raises(VideoError, match="truncated: decoded 30 of 31 frames"):
            media.decode_probed(path, longer, [3, 30], decoder)
        assert media.indices_of(media.decode_probed(path, found, [3, 29], decoder)[0]) == [3, 29]


def test_joined_streams_whose_clock_restarts_are_refused(tmp_path: Path, folder: Path) -> None:
    part = media.clip(folder, "h264.ts").read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(part + part)
    assert "time stamps go backwards" in reason_against(path)


def test_pictures_too_wide_and_clips_too_long_are_refused(tmp_path: Path, folder: Path, monkeypatch: Any) -> None:
    wide = media.write_clip(
        tmp_path / "wide.png", codec="png", pixels="rgb24", frames=1, container="image2", height=12, width=8200
    )
    assert reason_against(wide) == "too large: 8200x12 pixels, more than 8192 a side"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "check_frame", lambda *_: None)
        assert "8200x12" in reason_against(wide), "the container's own figure counts before anything is decoded"
    grows = tmp_path / "grows.ts"
    larger = media.write_clip(tmp_path / "larger.ts", frames=10, height=96, width=160)
    grows.write_bytes(media.clip(folder, "h264.ts").read_bytes() + larger.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "MAX_SIDE", 100)
        assert reason_against(grows) == "too large: 160x96 pixels, more than 100 a side"
    monkeypatch.setattr(video, "MAX_FRAMES", 29)
    assert reason_against(media.clip(folder, "h264.mp4")) == "more than 29 frames"
    assert reason_against(media.clip(folder, "h264.ts")) == "more than 29 frames"
