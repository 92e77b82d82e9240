"""The two encoders: the VAE's encoder half, and T5. They are never on the device together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from shared.config import Precompute
from shared.device import DTYPES
from shared.errors import UsageError
from shared.model.geometry import ENCODE_CHUNK_FRAMES
from shared.model.pretrained import Component


def vae_precision(requested: str, part: Component) -> str:
    """Resolve `auto` to the published precision, but fp16 to tf32: fp16 gives NaN on some clips (CogVideo#343).

    TF32 has the mantissa of fp16 (10 bits) and the range of fp32; a CPU computes it as fp32.
    """
    if requested != "auto":
        return requested
    own = part.dtype()
    return "tf32" if own == "fp16" else own


@contextmanager
def fp32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Set how a GPU multiplies fp32 values while entered; torch's switches are restored.

    cuDNN's default is TF32; "ieee" has the CPU's precision.
    """
    switches: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = precision
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


class VaeEncoder:
    """The VAE's encoder: clips -> moments of the posterior, in 8-frame chunks as in diffusers."""

    def __init__(self, part: Component, settings: Precompute, device: torch.device) -> None:
        from diffusers import AutoencoderKLCogVideoX

        precision = vae_precision(settings.vae_dtype, part)
        vae = AutoencoderKLCogVideoX.from_pretrained(
            str(part.folder), variant=part.variant, use_safetensors=True, dtype=DTYPES[precision]
        )
        assert vae.num_sample_frames_batch_size == ENCODE_CHUNK_FRAMES
        vae.decoder = None  # only the encoder's weights go to the device
        if settings.enable_tiling:
            vae.enable_tiling()
        if settings.enable_slicing:
            vae.enable_slicing()
        if settings.channels_last:
            # Its 2D convolutions have no such layout, so the whole module cannot be converted at once.
            for module in vae.encoder.modules():
                if isinstance(module, nn.Conv3d):
                    module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self._layout = torch.channels_last_3d if settings.channels_last else torch.contiguous_format
        self.vae = vae.eval().requires_grad_(False).to(device)
        if settings.compile_vae:
            self.vae.encoder = CompiledModule(self.vae.encoder)
        self._dtype = DTYPES[precision]
        self._products: Literal["ieee", "tf32"] = "tf32" if precision == "tf32" else "ieee"
        self.device = device

    @torch.no_grad()
    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """Encode float32 [B,3,F,H,W] to moments [B,2C,F',H/8,W/8]: unscaled mean and logvar, on the device.

        Out of GPU memory, the batch is halved until one clip is left; then the error is raised.
        """
        try:
            pixels = clips.to(self.device, self._dtype, memory_format=self._layout)
            with fp32_products(self._products):
                moments: torch.Tensor = self.vae.encode(pixels).latent_dist.parameters
            return moments.contiguous()
        except torch.cuda.OutOfMemoryError:
            if len(clips) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(clips) // 2
        return torch.cat([self.encode(clips[:half]), self.encode(clips[half:])])


class CompiledModule(nn.Module):
    """A module under torch.compile, which compiles at the first call of a shape; `UsageError` if that fails."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._compiled = torch.compile(module)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException  # two seconds, but diffusers has imported it by now

        try:
            return self._compiled(*arguments, **named)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = (str(cause).strip() or "no reason given").splitlines()[0]
            raise UsageError(
                f"precompute.compile_vae = true: torch.compile fails ({type(cause).__name__}: {reason}); "
                "install a C++ compiler, and triton for a GPU, or leave it false"
            ) from error


class TextEncoder:
    """T5: captions -> last hidden state, all pad positions kept, no mask, as in diffusers' CogVideoX pipelines."""

    def __init__(
        self, part: Component, tokenizer: Any, settings: Precompute, device: torch.device, text_length: int
    ) -> None:
        """Load T5; with `text_offload`, each layer's weights stay in host memory until the layer runs."""
        from transformers import T5EncoderModel

        precision = part.precision(settings.text_dtype)
        model: Any = T5EncoderModel.from_pretrained(
            str(part.folder), variant=part.variant, use_safetensors=True, dtype=DTYPES[precision]
        )
        model = model.eval().requires_grad_(False)
        if settings.text_offload:
            from accelerate import cpu_offload

            self.model = cpu_offload(model, execution_device=device)
        else:
            self.model = model.to(device)
        self._tokenizer = tokenizer
        self._dtype = DTYPES[precision]
        self._text_length = text_length
        self.device = device

    @torch.no_grad()
    @fp32_products("ieee")
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode B texts to prompt_embeds [B,L,D] in the encoder's precision, on the CPU."""
        ids = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=self._text_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids
        embeds: torch.Tensor = self.model(ids.to(self.device))[0]
        return embeds.to(self._dtype).cpu()


def load_tokenizer(folder: str) -> Any:
    """Load T5's tokenizer; raises `OSError` if its files are missing."""
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(folder)
