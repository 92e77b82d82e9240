"""From decoded frames to what the VAE eats."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from precompute.pixels import Mode, crop_offset, scaled_into, scaled_size, thumbnails
from precompute.pixels import to_clip as normalized
from shared.media.picture import Look, fit
from shared.model.geometry import Bucket, latent_frames

BUCKET = Bucket(2, 16, 32)


def frames(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def to_clip(source: torch.Tensor, bucket: Bucket, *, mode: Mode, flip: bool, crop_seed: str) -> torch.Tensor:
    """Scale and crop as the decode process does, then normalize."""
    height, width = source.shape[1:3]
    scaled = scaled_into(height, width, bucket, mode, crop_seed)
    pictures = [fit(frame, Look((height, width)), scaled) for frame in source.numpy()]
    return normalized(torch.from_numpy(np.stack(pictures)), bucket, flip=flip)


@pytest.mark.parametrize("size", [(270, 480), (90, 200), (33, 47), (16, 33)])
def test_a_resize_by_pieces_is_torchs_of_the_whole_clip(size: tuple[int, int]) -> None:
    source = frames(*size)
    pixels = source.permute(0, 3, 1, 2).float()
    scaled = scaled_size(*size, BUCKET, "center")
    whole = F.interpolate(pixels, size=scaled, mode="bicubic", antialias=True, align_corners=False)
    top, left = crop_offset(*scaled, BUCKET, "center", "")
    expected = ((whole - 127.5) / 127.5)[:, :, top : top + 16, left : left + 32].transpose(0, 1)
    clip = to_clip(source, BUCKET, mode="center", flip=False, crop_seed="")
    torch.testing.assert_close(clip, expected, rtol=0, atol=2e-5)


def test_flip_mirrors_left_and_right() -> None:
    plain, mirrored = (to_clip(frames(16, 32), BUCKET, mode="center", flip=f, crop_seed="s") for f in (False, True))
    assert torch.equal(mirrored, plain.flip(3)) and not torch.equal(mirrored, plain)


def test_center_takes_the_middle_and_random_is_drawn_by_its_seed_only() -> None:
    source = frames(32, 32)
    middle = to_clip(source, BUCKET, mode="center", flip=False, crop_seed="s")
    assert torch.equal(middle, to_clip(source[:, 8:24], BUCKET, mode="center", flip=False, crop_seed="s"))
    drawn = {seed: crop_offset(32, 32, BUCKET, "random", seed) for seed in map(str, range(50))}
    assert drawn == {seed: crop_offset(32, 32, BUCKET, "random", seed) for seed in drawn}
    assert {left for _, left in drawn.values()} == {0} and len({top for top, _ in drawn.values()}) > 8
    assert {crop_offset(32, 32, BUCKET, "random", str(number))[0] for number in range(500)} == set(range(17))


@pytest.mark.parametrize(
    ("height", "width", "mode", "scaled", "place"),
    [
        (40, 48, "center", (27, 32), (5, 0)),
        (24, 53, "center", (16, 35), (0, 1)),
        (10, 20, "center", (16, 32), (0, 0)),
        (20, 90, "letterbox", (7, 32), (4, 0)),
        (32, 50, "letterbox", (16, 25), (0, 3)),
    ],
)
def test_a_resize_is_pillows_antialiased_bicubic_set_in_the_middle(
    height: int, width: int, mode: Mode, scaled: tuple[int, int], place: tuple[int, int]
) -> None:
    source = frames(height, width)
    planes = source.permute(0, 3, 1, 2).reshape(-1, height, width).float().numpy()
    images = [Image.fromarray(plane).resize(scaled[::-1], Image.Resampling.BICUBIC) for plane in planes]
    resized = [np.asarray(image) for image in images]
    whole = (torch.from_numpy(np.stack(resized)).reshape(2, 3, *scaled).transpose(0, 1) - 127.5) / 127.5
    clip = to_clip(source, BUCKET, mode=mode, flip=False, crop_seed="")
    (top, left), (tall, wide) = place, (min(scaled[0], 16), min(scaled[1], 32))
    if mode == "letterbox":
        torch.testing.assert_close(clip[..., top : top + tall, left : left + wide], whole, rtol=0, atol=1e-4)
        assert int((clip == -1).sum()) >= 6 * (16 * 32 - tall * wide)
    else:
        torch.testing.assert_close(clip, whole[..., top : top + tall, left : left + wide], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["center", "random", "letterbox"])
@given(height=st.integers(1, 2000), width=st.integers(1, 2000))
def test_the_scaled_size_covers_the_bucket_or_fits_into_it(mode: Mode, height: int, width: int) -> None:
    tall, wide = scaled_size(height, width, BUCKET, mode)
    assert tall == 16 or wide == 32
    if mode == "letterbox":
        assert tall <= 16 and wide <= 32
    else:
        assert tall >= 16 and wide >= 32


@pytest.mark.parametrize("count", [1, 5, 8, 9, 12, 13, 16, 49])
def test_a_thumbnail_frame_shows_what_a_latent_frame_does(count: int) -> None:
    """A ramp in time and space: four frames to a latent frame, and the first of 4k+1 alone."""
    levels = 2 * torch.arange(count).float()[:, None, None] + 100 * (torch.arange(16) // 8).float()
    shown = thumbnails((levels.expand(count, 16, 16) / 127.5 - 1).expand(3, -1, -1, -1))
    assert shown.shape == (latent_frames(count), 3, 2, 2) and shown.dtype == torch.uint8
    assert torch.equal(shown[:, :, :, 1], shown[:, :, :, 0] + 100)
    if count % 4 == 1:
        groups = levels[1:, 0, 0].reshape(-1, 4).mean(1)
        assert torch.equal(shown[:, 0, 0, 0], torch.cat([levels[:1, 0, 0], groups]).round().byte())
