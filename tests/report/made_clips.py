"""A folder of made videos with known faults: good, static, black, repeated, cut and letterboxed ones."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from precompute.pixels import scaled_into, thumbnails, to_clip
from precompute.windows import cut_windows
from shared.config import Data
from shared.media.decode import decode_rows, shape_of
from shared.media.probe import probe

HEIGHT, WIDTH, SECONDS, RATE = 128, 192, 4.5, 16
FAULTS = ("static", "black", "duplicate", "cut", "letterbox")


def texture(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Return a smooth picture of random colors, float [H,W,3]."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, cells, cells * 3 // 2)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return smooth.permute(1, 2, 0).clamp(0, 255).numpy()


def scene(rng: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """Return a panned or standing ground with one to three objects that move, uint8 [F,H,W,3] at `times` in seconds."""
    gain, offset = rng.uniform(0.35, 0.9), rng.uniform(5, 60)
    ground = texture(rng, 2 * HEIGHT, 2 * WIDTH, int(rng.integers(3, 12))) * gain + offset
    pan = rng.choice([0, 4, 12, 40]) * rng.uniform(-1, 1, 2)
    objects = [
        (rng.uniform(0, 255, 3), rng.uniform(0, 1, 2), rng.uniform(-0.25, 0.25, 2), rng.uniform(8, 30))
        for _ in range(rng.integers(1, 4))
    ]
    shake = rng.uniform(0, 2)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    frames = []
    for time in times:
        place = np.array([HEIGHT, WIDTH]) / 2 + pan * time + shake * np.sin(7 * time + np.arange(2))
        top, left = (int(value) for value in np.clip(place, 0, (HEIGHT, WIDTH)))
        frame = ground[top : top + HEIGHT, left : left + WIDTH].copy()
        for color, start, speed, radius in objects:
            y, x = (start + speed * time) % 1 * (HEIGHT, WIDTH)
            frame[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = color
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def write(path: Path, frames: np.ndarray, rate: int = RATE, crf: int = 23) -> None:
    """Encode frames with x264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": str(crf), "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def times(rate: int = RATE) -> np.ndarray:
    """Return the times of a clip's frames."""
    return np.arange(int(SECONDS * rate)) / rate


def write_clips(folder: Path, good: int, each: int, first_seed: int = 0) -> None:
    """Write good clips, and `each` of every fault, named by it; the duplicates repeat the first good ones."""
    folder.mkdir(parents=True)
    for number in range(good):
        write(folder / f"good-{number:03}.mp4", scene(np.random.default_rng(first_seed + number), times()))
    for number in range(each):

        def made(seed: int) -> np.ndarray:
            return scene(np.random.default_rng(first_seed + seed), times())

        rng = np.random.default_rng(first_seed + 5000 + number)
        still = made(1000 + number)[:1].repeat(len(times()), 0)
        noise = rng.normal(0, 2, still.shape)  # of a camera
        write(folder / f"static-{number}.mp4", (still + noise).clip(0, 255).astype(np.uint8))
        dark = rng.integers(0, 12, (len(times()), HEIGHT, WIDTH, 1)).repeat(3, 3).astype(np.uint8)
        write(folder / f"black-{number}.mp4", dark)
        again = scene(np.random.default_rng(first_seed + number), times(12))
        write(folder / f"zz-duplicate-{number}.mp4", again, 12, crf=32)
        parts = made(2000 + number), made(3000 + number)
        at = int(rng.uniform(0.2, 0.8) * len(times()))
        write(folder / f"cut-{number}.mp4", np.concatenate([parts[0][:at], parts[1][at:]]))
        barred, thick = made(4000 + number), int(rng.uniform(0.1, 0.2) * HEIGHT)
        barred[:, :thick], barred[:, -thick:] = 0, 0
        write(folder / f"letterbox-{number}.mp4", barred)


def thumbnails_of(path: Path) -> np.ndarray:
    """Return the thumbnails that stage 1 stores for a video's first 33 frames at 8 per second."""
    data = Data(name="made", instance_data_root=path.parent, frame_buckets=(33,), resolution_buckets=((128, 192),))
    found = probe(path)
    windows = cut_windows(found.timestamps_us, HEIGHT, WIDTH, data, end_us=found.probe.end_us)
    assert isinstance(windows, list), windows
    scaled = scaled_into(HEIGHT, WIDTH, windows[0].bucket, "center", "")
    scaled, shape, dtype = shape_of(found.probe, scaled)
    frames = np.empty((len(windows[0].indices), *shape), dtype)
    decode_rows(path, found.probe, windows[0].indices, windows[0].timestamps_us, "pyav", scaled, frames)
    return thumbnails(to_clip(torch.from_numpy(frames), windows[0].bucket, flip=False)).numpy()
