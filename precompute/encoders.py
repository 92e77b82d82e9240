"""The two encoders: the VAE's encoder half, and T5. Never on the device together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shared.device import DTYPES
from shared.errors import UsageError
from shared.model.geometry import ENCODE_CHUNK_FRAMES
from shared.model.pretrained import Part
from shared.model.quantize import QuantizedLinear

INT8 = "int8-2"
"""Names the arithmetic of `quantize`; part of the recipe, so changing the arithmetic means changing the name."""
TEXTS_PER_BLOCK = 250
"""Texts that are tokenized at once where only the number of tokens matters; one of 150 words takes 0.2 MB."""


def vae_precision(requested: str, part: Part) -> str:
    """`auto` is the published one, fp16 raised to fp32: fp16 encoding gives NaN on some clips (CogVideo#343)."""
    if requested != "auto":
        return requested
    own = part.dtype()
    return "fp32" if own == "fp16" else own


@contextmanager
def no_tf32() -> Iterator[None]:
    """fp32 means fp32 within, as on a CPU with the same keys. cuDNN's default is TF32, with a mantissa of 10 bits.

    torch's switches are put back as they were.
    """
    switches: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


class VaeEncoder:
    """Clips -> moments of the posterior, in 8-frame chunks as diffusers encodes them."""

    def __init__(
        self,
        part: Part,
        precision: str,
        device: torch.device,
        *,
        tiling: bool,
        slicing: bool,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        from diffusers import AutoencoderKLCogVideoX

        vae = AutoencoderKLCogVideoX.from_pretrained(
            str(part.folder), variant=part.variant, use_safetensors=True, dtype=DTYPES[precision]
        )
        assert vae.num_sample_frames_batch_size == ENCODE_CHUNK_FRAMES
        vae.decoder = None  # only the encoder's weights travel to the device
        if tiling:
            vae.enable_tiling()
        if slicing:
            vae.enable_slicing()
        if channels_last:
            # Its 2D convolutions have no such layout, so the whole module cannot be converted at once.
            for module in vae.encoder.modules():
                if isinstance(module, nn.Conv3d):
                    module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self._layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        self._vae = vae.eval().requires_grad_(False).to(device)
        if compiled:
            self._vae.encoder = _Compiled(self._vae.encoder)
        self._dtype = DTYPES[precision]
        self.device = device

    @torch.no_grad()
    @no_tf32()
    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """float32 [B,3,F,H,W] -> [B,2C,F',H/8,W/8] mean and logvar, unscaled, in the encoder's precision, on the CPU.

        Out of GPU memory, the batch is halved until one clip is left; then the error passes through.
        """
        try:
            pixels = clips.to(self.device, self._dtype, memory_format=self._layout)
            moments: torch.Tensor = self._vae.encode(pixels).latent_dist.parameters
            return moments.contiguous().cpu()
        except torch.cuda.OutOfMemoryError:
            if len(clips) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(clips) // 2
        return torch.cat([self.encode(clips[:half]), self.encode(clips[half:])])


class _Compiled(nn.Module):
    """torch.compile, which compiles at the first call of a shape; raises `UsageError` where that fails."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._compiled = torch.compile(module)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException  # two seconds, and diffusers has it loaded by now

        try:
            return self._compiled(*arguments, **named)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = (str(cause).strip() or "no reason given").splitlines()[0]
            raise UsageError(
                f"precompute.compile_vae = true: torch.compile fails here ({type(cause).__name__}: {reason}); "
                "it needs a C++ compiler, and on a GPU triton; or leave it false"
            ) from error


class TextEncoder:
    """Captions -> T5's last hidden state, all pad positions kept, no mask: as the CogVideoX pipelines call it."""

    def __init__(
        self,
        part: Part,
        tokenizer: Any,
        precision: str,
        device: torch.device,
        text_length: int,
        *,
        int8: bool = False,
    ) -> None:
        from transformers import T5EncoderModel

        model: Any = T5EncoderModel.from_pretrained(
            str(part.folder), variant=part.variant, use_safetensors=True, dtype=DTYPES[precision]
        )
        if int8:
            quantize(model)  # before it travels: the device never holds the wide weights
        self._model = model.eval().requires_grad_(False).to(device)
        self._tokenizer = tokenizer
        self._dtype = DTYPES[precision]
        self._text_length = text_length
        self.device = device

    @torch.no_grad()
    @no_tf32()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """B texts -> [B,L,D] in the encoder's precision, on the CPU."""
        ids = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=self._text_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids
        embeds: torch.Tensor = self._model(ids.to(self.device))[0]
        return embeds.to(self._dtype).cpu()


class _KeptPrecision(QuantizedLinear):
    """Its product has the precision of the wide layer, whatever its tokens have.

    transformers keeps T5's `wo` in fp32 within an fp16 model (`_keep_in_fp32_modules`), since its values may be beyond
    65504; it casts the tokens itself, but not for a weight of type int8.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self._precision = layer.weight.dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens.to(self._precision))


def quantize(model: nn.Module) -> None:
    """Put every linear layer in int8, in place; embeddings, norms and the position biases stay as they are."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, _KeptPrecision(layer))


def load_tokenizer(folder: str) -> Any:
    """T5's tokenizer from its folder; raises `OSError` if its files are not there."""
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(folder)


def truncated_tokens(tokenizer: Any, texts: Sequence[str], text_length: int) -> list[int]:
    """How many tokens of each text lie beyond the text length and are cut off."""
    beyond: list[int] = []
    for start in range(0, len(texts), TEXTS_PER_BLOCK):
        block = tokenizer(list(texts[start : start + TEXTS_PER_BLOCK]), return_attention_mask=False)
        beyond += [max(0, len(ids) - text_length) for ids in block.input_ids]
    return beyond
