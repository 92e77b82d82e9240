"""Batches of clips on the device: frames are copied in, encoded and copied back while the host goes on.

Copies run through pinned memory on two streams of their own, so that the GPU encodes one batch while the frames of the
next come in and the results of the last go out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from precompute.discover import Clip, Stage
from precompute.encoders import VaeEncoder
from precompute.pixels import thumbnails, to_clip
from shared import seeding
from shared.cache.shard import Sample
from shared.errors import UsageError
from shared.fingerprint import Json
from shared.host_memory import CopyStream, HostAllocator, host_empty
from shared.media.child import Decoded
from shared.model.geometry import Bucket, latent_shape


@dataclass(frozen=True, slots=True)
class Launched:
    """A batch that the device works on."""

    results: list[Sample]
    """Their tensors, on the host, are not written yet."""
    written: torch.cuda.Event | None
    """The end of the copies to the host; None where they are done."""
    on_device: object
    """What the device still reads."""

    def samples(self) -> list[Sample]:
        """Wait for the results and return them, with tensors on the CPU."""
        if self.written is not None:
            self.written.synchronize()
        return self.results


class ClipEncoder:
    """Encodes decoded clips batch by batch."""

    def __init__(
        self, stage: Stage, clips: Mapping[str, Clip], encoder: VaeEncoder, allocate: HostAllocator | None = None
    ) -> None:
        """`clips` are those that may come, by key; `allocate` makes the host's buffers, by default for a GPU alone."""
        self._stage, self._clips, self._encoder, self._device = stage, clips, encoder, encoder.device
        self._allocate = host_empty if allocate is None and self._device.type == "cuda" else allocate
        self._copies_in, self._copies_out = CopyStream(self._device), CopyStream(self._device)
        self.num_under_way = 0 if self._allocate is None else 1
        """Batches to leave under way while the next one is launched."""

    def launch(self, decoded: Mapping[str, Decoded]) -> Launched:
        """Begin to encode one batch of one bucket; raises `UsageError` if training could not use the result."""
        if not decoded:
            return Launched([], None, None)
        noised = self._stage.config.precompute.noised_image_count
        image_to_video = self._stage.encoders.conventions.image_to_video
        with self._copies_in.beside_compute():
            frames = {key: self._to_device(result.frames) for key, result in decoded.items()}
            noises = {
                key: [self._to_device(noise) for noise in conditioning_noise(self._bucket(key), noised, key)]
                for key in (decoded if image_to_video else ())
            }
        self._copies_in.compute_waits(self._copies_in.record())
        pixels = {
            key: to_clip(found, self._bucket(key), flip=self._clips[key].window.flip) for key, found in frames.items()
        }
        moments = self._encoder.encode(torch.stack(list(pixels.values())))
        _check_shape(self._stage, self._bucket(next(iter(decoded))), moments)
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, clip_moments in zip(decoded, moments, strict=True):
            tensors[key] = {"moments": clip_moments, "thumbnails": thumbnails(pixels[key])}
            if image_to_video:
                images = conditioning_images(pixels[key][:, :1], noises[key])
                tensors[key]["image_moments"] = torch.cat([self._encoder.encode(image[None]) for image in images])
        with self._copies_out.after_compute():
            samples = [
                Sample(key, {name: self._to_host(tensor) for name, tensor in found.items()}, self._facts(key, decoded))
                for key, found in tensors.items()
            ]
        return Launched(samples, self._copies_out.record(), (frames, noises, tensors))

    def _bucket(self, key: str) -> Bucket:
        return self._clips[key].window.bucket

    def _facts(self, key: str, decoded: Mapping[str, Decoded]) -> dict[str, Json]:
        window = self._clips[key].window
        return {
            "source_sha256": self._clips[key].probe.sha256,
            "bucket": str(window.bucket),
            "timestamps_us": list(window.timestamps_us),
            "flip": window.flip,
            "decoder": decoded[key].decoder,
        }

    def _to_device(self, array: np.ndarray) -> Tensor:
        if self._allocate is None:
            return torch.from_numpy(array)
        buffer = self._allocate(array.nbytes, self._device)
        buffer.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        staged = buffer.view(torch.from_numpy(array).dtype).view(array.shape)
        return torch.empty(staged.shape, dtype=staged.dtype, device=self._device).copy_(staged, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._allocate is None:
            return tensor
        buffer = self._allocate(tensor.nbytes, self._device)
        return buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def _check_shape(stage: Stage, bucket: Bucket, moments: Tensor) -> None:
    """Raise `UsageError` for moments [B,2C,F,H,W] of another size than the bucket's, before hours are spent."""
    channels, *size = latent_shape(bucket, stage.encoders.conventions.out_channels)
    expected, found = (2 * channels, *size), tuple(moments.shape[1:])
    if found == expected:
        return
    assert stage.config.precompute.enable_tiling, f"{found} is not {expected}"
    by = "x".join
    raise UsageError(
        f"precompute.enable_tiling = true: the VAE's tiles do not fit clips of {bucket}: expected moments of "
        f"{by(map(str, expected))}, got {by(map(str, found))}; leave it false or choose other data.resolution_buckets"
    )


def conditioning_noise(bucket: Bucket, noised: int, key: str) -> list[np.ndarray]:
    """Return `noised` draws [3,1,H,W] of sigma * noise, sigma = exp(N(-3, 0.5)) drawn by key.

    Source: diffusers `train_cogvideox_image_to_video_lora.py` (noise in pixel space before the VAE).
    """
    noises = []
    for number in range(noised):
        sigma = float(seeding.normal((1,), "image-sigma", key, number).mul(0.5).sub(3.0).exp())
        noise = seeding.normal((3, 1, bucket.height, bucket.width), "image-noise", key, number)
        noises.append(noise.numpy() * np.float32(sigma))
    return noises


def conditioning_images(first_frame: Tensor, noises: Sequence[Tensor]) -> list[Tensor]:
    """Return the clean frame [3,1,H,W] and its noised copies."""
    return [first_frame, *(first_frame + noise for noise in noises)]
