"""The encoders: batches, tiling, slicing, precision, offload and out-of-memory."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5EncoderModel

from precompute import prompts
from precompute.clip_encoder import conditioning_images, conditioning_noise
from precompute.encoders import CompiledModule, TextEncoder, VaeEncoder, load_tokenizer, vae_precision
from shared.config import Model, Precompute
from shared.errors import UsageError
from shared.model.geometry import Bucket
from shared.model.pretrained import Component, pretrained_part
from tests.corpus import config_for, run, write_corpus
from tests.tiny import TEXT_LENGTH

CPU = torch.device("cpu")
CONVOLUTIONS: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def vae(pipeline: Path) -> Component:
    return pretrained_part(Model(pretrained_model_name_or_path=str(pipeline)), "vae")


@pytest.fixture(scope="module")
def t5(pipeline: Path) -> TextEncoder:
    part = pretrained_part(Model(pretrained_model_name_or_path=str(pipeline)), "text_encoder")
    return TextEncoder(
        part,
        load_tokenizer(str(pipeline / "tokenizer")),
        Precompute(cache="unused", text_dtype="fp32"),
        CPU,
        TEXT_LENGTH,
    )


def clips(count: int, frames: int = 9, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(count, 3, frames, height, width, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def encoder(part: Component, **settings: Any) -> VaeEncoder:
    return VaeEncoder(part, Precompute(**{"cache": "unused", "vae_dtype": "fp32", **settings}), CPU)


@pytest.mark.parametrize("frames", [1, 17])
def test_batch_equals_single_clips(vae: Component, frames: int) -> None:
    batch, encoding = clips(2, frames), encoder(vae)
    together = encoding.encode(batch)
    alone = torch.cat([encoding.encode(clip[None]) for clip in batch])
    assert together.shape == (2, 32, (frames - 1) // 4 + 1, 4, 6)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_slicing_keeps_the_latents_and_tiling_changes_them(vae: Component) -> None:
    batch = clips(2, frames=5, height=96, width=160)
    plain = encoder(vae).encode(batch)
    torch.testing.assert_close(encoder(vae, enable_slicing=True).encode(batch), plain, rtol=1e-5, atol=1e-5)
    tiled = encoder(vae, enable_tiling=True).encode(batch)
    assert tiled.shape == plain.shape and (tiled - plain).abs().max() > 1e-3


def test_channels_last_keeps_the_latents(vae: Component) -> None:
    batch = clips(2, frames=9)
    laid_out = encoder(vae, channels_last=True)
    weight = laid_out.vae.encoder.conv_in.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    moments = laid_out.encode(batch)
    assert moments.is_contiguous()
    torch.testing.assert_close(moments, encoder(vae).encode(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.faults  # compiling takes long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_encoder_keeps_the_latents(vae: Component) -> None:
    compiled = encoder(vae, compile_vae=True)
    for frames in (1, 9):
        batch = clips(1, frames)
        torch.testing.assert_close(compiled.encode(batch), encoder(vae).encode(batch), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.faults  # dynamo takes long to import
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_missing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing that was compiled before
    without = torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "g++"))})
    wanted = r"compile_vae = true.*No working C\+\+ compiler.*leave it false"
    with without, pytest.raises(UsageError, match=wanted) as caught:
        CompiledModule(nn.Linear(2, 2))(torch.ones(1, 2))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_moments_have_the_precision_of_the_recipe(vae: Component) -> None:
    moments = encoder(vae, vae_dtype="bf16").encode(clips(1, frames=5))
    assert moments.dtype == torch.bfloat16
    torch.testing.assert_close(moments.float(), encoder(vae).encode(clips(1, frames=5)), rtol=0.1, atol=0.1)


def fp32_switches() -> tuple[str, str]:
    return CONVOLUTIONS.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def set_fp32_switches(convolutions: str, products: str) -> None:
    CONVOLUTIONS.fp32_precision = convolutions
    torch.backends.cuda.matmul.fp32_precision = products


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allow TF32 everywhere."""
    before = fp32_switches()
    set_fp32_switches("tf32", "tf32")
    yield
    set_fp32_switches(*before)


def test_only_tf32_is_tf32_and_switches_are_restored(vae: Component, t5: TextEncoder, tf32: None) -> None:
    within: list[tuple[str, str]] = []

    def look(*_: object) -> None:
        within.append(fp32_switches())

    encoding = encoder(vae)
    encoding.vae.encoder.conv_in.register_forward_hook(look)
    encoding.encode(clips(1, frames=1))
    hook = t5.model.encoder.block[0].register_forward_hook(look)
    t5.encode(["a"])
    hook.remove()
    with pytest.raises(ValueError, match="expected"):
        encoding.encode(torch.zeros(1))
    assert within == [("ieee", "ieee")] * 2
    assert fp32_switches() == ("tf32", "tf32")
    set_fp32_switches("ieee", "ieee")
    asked = encoder(vae, vae_dtype="tf32")
    asked.vae.encoder.conv_in.register_forward_hook(look)
    assert asked.encode(clips(1, frames=1)).dtype == torch.float32
    assert within[2:] == [("tf32", "tf32")] and fp32_switches() == ("ieee", "ieee")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fp32_on_the_gpu_is_fp32(vae: Component) -> None:
    batch = clips(2, frames=9, height=96, width=160)
    expected = encoder(vae).encode(batch)
    found = VaeEncoder(vae, Precompute(cache="unused", vae_dtype="fp32"), torch.device("cuda")).encode(batch).cpu()
    assert (found - expected).norm() / expected.norm() < 1e-5  # with TF32 about 3e-4


def test_automatic_precision_raises_fp16_to_tf32(vae: Component, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [vae_precision(asked, vae) for asked in ("auto", "tf32", "fp16")] == ["fp32", "tf32", "fp16"]
    for own, used in (("fp16", "tf32"), ("bf16", "bf16"), ("fp32", "fp32")):
        monkeypatch.setattr(Component, "dtype", lambda _, own=own: own)
        assert vae_precision("auto", vae) == used


class CrampedVae:
    """A real VAE on a card with room for `room` clips."""

    def __init__(self, real: Any, room: int) -> None:
        self.real, self.room = real, room
        self.batches: list[int] = []

    def encode(self, batch: torch.Tensor) -> Any:
        self.batches.append(len(batch))
        if len(batch) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.real.encode(batch)


def test_out_of_memory_halves_the_batch_down_to_one(vae: Component) -> None:
    cramped = encoder(vae)
    real, batch = cramped.vae, clips(5, frames=5)
    assert real.decoder is None
    whole = cramped.encode(batch)
    for room, batches in ((3, [5, 2, 3]), (1, [5, 2, 1, 1, 3, 1, 2, 1, 1])):
        cramped.vae = CrampedVae(real, room)
        torch.testing.assert_close(cramped.encode(batch), whole, rtol=1e-5, atol=1e-5)
        assert cramped.vae.batches == batches
    cramped.vae = CrampedVae(real, 0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        cramped.encode(clips(2, frames=5))


def test_embedding_is_independent_of_its_batch(t5: TextEncoder) -> None:
    texts = ["a grey rabbit yawns", "", "two children fly a red kite at dusk and then much more than fits"]
    together = t5.encode(texts)
    assert together.shape == (3, TEXT_LENGTH, 32)
    torch.testing.assert_close(together, torch.cat([t5.encode([text]) for text in texts]), rtol=1e-5, atol=1e-5)


def test_embedding_is_t5s_last_hidden_state_without_a_mask(t5: TextEncoder, pipeline: Path) -> None:
    model = T5EncoderModel.from_pretrained(pipeline / "text_encoder").eval()
    tokenizer = load_tokenizer(str(pipeline / "tokenizer"))
    ids = tokenizer(["a bird"], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    assert ids.shape == (1, TEXT_LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(t5.encode(["a bird"]), model(ids)[0])


def test_offloaded_t5_gives_the_same_bits(pipeline: Path) -> None:
    part = pretrained_part(Model(pretrained_model_name_or_path=str(pipeline)), "text_encoder")
    tokenizer = load_tokenizer(str(pipeline / "tokenizer"))
    texts = ["a grey rabbit yawns", ""]
    whole = TextEncoder(part, tokenizer, Precompute(cache="unused", text_dtype="fp16"), CPU, TEXT_LENGTH)
    settings = Precompute(cache="unused", text_dtype="fp16", text_offload=True)
    offloaded = TextEncoder(part, tokenizer, settings, CPU, TEXT_LENGTH)
    assert {parameter.device.type for parameter in offloaded.model.parameters()} == {"meta"}
    for _ in range(2):
        assert torch.equal(offloaded.encode(texts), whole.encode(texts))


@pytest.mark.parametrize("text_offload", [False, True])
def test_t5_is_freed_before_the_vae_is_loaded(text_offload: bool, pipeline: Path, tmp_path: Path) -> None:
    config = config_for(pipeline, write_corpus(tmp_path / "clips", 1), tmp_path / "cache", text_offload=text_offload)
    made: list[weakref.ref[nn.Module]] = []

    class Watched(TextEncoder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self.model))

    gc.disable()  # a collection comes too late, or never
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompts, "TextEncoder", Watched)
            run(config)
        assert [model() for model in made] == [None]
    finally:
        gc.enable()


def test_conditioning_images_are_the_frame_and_noised_copies() -> None:
    frame, size = clips(1)[0][:, :1], Bucket(9, 32, 48)
    noises = [torch.from_numpy(noise) for noise in conditioning_noise(size, 100, "key")]
    images = conditioning_images(frame, noises)
    assert torch.equal(images[0], frame) and torch.equal(images[100], frame + noises[99]) and len(images) == 101
    assert torch.equal(noises[0], torch.from_numpy(conditioning_noise(size, 1, "key")[0]))
    one, two, three = (noise.flatten() for noise in (*noises[:2], torch.from_numpy(*conditioning_noise(size, 1, "x"))))
    correlations = torch.corrcoef(torch.stack([one, two, three]))
    assert correlations.fill_diagonal_(0).abs().max() < 0.2, "each copy and each clip has noise of its own"
    sigmas = torch.tensor([float(noise.std()) for noise in noises]).log()
    assert abs(float(sigmas.mean()) + 3.0) < 0.15 and abs(float(sigmas.std()) - 0.5) < 0.1


def test_non_finite_embedding_stops_the_run() -> None:
    from precompute.prompts import encode_texts
    from shared.errors import DataError

    broken: Any = SimpleNamespace(encode=lambda texts: torch.full((len(texts), 2, 2), float("nan")))
    with pytest.raises(DataError, match="prompt 'a rabbit': its embedding is not finite"):
        encode_texts(broken, {"0" * 32: "a rabbit"})
