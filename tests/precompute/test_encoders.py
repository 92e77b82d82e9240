"""The encoders: batches equal single clips, tiling changes latents, slicing does not, a full card halves the batch."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5EncoderModel

from precompute.encoders import TextEncoder, VaeEncoder, _Compiled, load_tokenizer, truncated_tokens, vae_precision
from precompute.latents import conditioning_images
from shared.config import Model
from shared.errors import UsageError
from shared.model.pretrained import Part, pretrained_part
from shared.model.quantize import QuantizedLinear
from tests.tiny import TEXT_LENGTH

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(pipeline: Path) -> Part:
    return pretrained_part(Model(pretrained_model_name_or_path=str(pipeline)), "vae")


@pytest.fixture(scope="module")
def t5(pipeline: Path) -> TextEncoder:
    part = pretrained_part(Model(pretrained_model_name_or_path=str(pipeline)), "text_encoder")
    return TextEncoder(part, load_tokenizer(str(pipeline / "tokenizer")), "fp32", CPU, TEXT_LENGTH)


def clips(count: int, frames: int = 9, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(count, 3, frames, height, width, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def encoder(part: Part, *, tiling: bool = False, slicing: bool = False, precision: str = "fp32") -> VaeEncoder:
    return VaeEncoder(part, precision, CPU, tiling=tiling, slicing=slicing)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_a_batch_of_clips_gives_what_one_at_a_time_gives(vae, frames):
    batch = clips(3, frames)
    together = encoder(vae).encode(batch)
    alone = torch.cat([encoder(vae).encode(clip[None]) for clip in batch])
    assert together.shape == (3, 32, (frames - 1) // 4 + 1, 4, 6)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_slicing_keeps_the_latents_and_tiling_changes_them(vae):
    batch = clips(2, frames=5, height=96, width=160)
    plain = encoder(vae).encode(batch)
    torch.testing.assert_close(encoder(vae, slicing=True).encode(batch), plain, rtol=1e-5, atol=1e-5)
    tiled = encoder(vae, tiling=True).encode(batch)
    assert tiled.shape == plain.shape and (tiled - plain).abs().max() > 1e-3


def test_the_channels_last_layout_keeps_the_latents(vae):
    batch = clips(2, frames=9)
    laid_out = VaeEncoder(vae, "fp32", CPU, tiling=False, slicing=False, channels_last=True)
    weight = laid_out._vae.encoder.conv_in.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    moments = laid_out.encode(batch)
    assert moments.is_contiguous()
    torch.testing.assert_close(moments, encoder(vae).encode(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.faults  # compiling takes long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_encoder_keeps_the_latents(vae):
    compiled = VaeEncoder(vae, "fp32", CPU, tiling=False, slicing=False, compiled=True)
    for frames in (1, 9):
        batch = clips(1, frames)
        torch.testing.assert_close(compiled.encode(batch), encoder(vae).encode(batch), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_without_a_compiler_a_compiled_encoder_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    import torch._inductor.config

    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing that was compiled before
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "g++")))
    with pytest.raises(UsageError, match=r"compile_vae = true.*No working C\+\+ compiler.*leave it false") as caught:
        _Compiled(nn.Linear(2, 2))(torch.ones(1, 2))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_what_is_stored_has_the_precision_of_the_recipe(vae):
    moments = encoder(vae, precision="bf16").encode(clips(1, frames=5))
    assert moments.dtype == torch.bfloat16
    torch.testing.assert_close(moments.float(), encoder(vae).encode(clips(1, frames=5)), rtol=0.1, atol=0.1)


def fp32_switches() -> tuple[str, str]:
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def set_fp32_switches(convolutions: str, products: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = convolutions
    torch.backends.cuda.matmul.fp32_precision = products


@pytest.fixture
def tf32() -> Iterator[None]:
    """A process that allows TF32 everywhere."""
    before = fp32_switches()
    set_fp32_switches("tf32", "tf32")
    yield
    set_fp32_switches(*before)


def test_fp32_is_never_tf32_and_torchs_switches_are_left_as_they_were(vae, t5, tf32):
    within: list[tuple[str, str]] = []

    def look(*_: object) -> None:
        within.append(fp32_switches())

    encoding = encoder(vae)
    encoding._vae.encoder.conv_in.register_forward_hook(look)
    encoding.encode(clips(1, frames=1))
    hook = t5._model.encoder.block[0].register_forward_hook(look)
    t5.encode(["a"])
    hook.remove()
    with pytest.raises(ValueError, match="expected"):
        encoding.encode(torch.zeros(1))
    assert within == [("ieee", "ieee")] * 2
    assert fp32_switches() == ("tf32", "tf32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fp32_on_the_gpu_is_fp32(vae):
    batch = clips(2, frames=9, height=96, width=160)
    expected = encoder(vae).encode(batch)
    found = VaeEncoder(vae, "fp32", torch.device("cuda"), tiling=False, slicing=False).encode(batch)
    assert (found - expected).norm() / expected.norm() < 1e-5  # with TF32 about 3e-4


def test_half_precision_is_raised_when_nothing_is_asked(vae, monkeypatch):
    assert [vae_precision(asked, vae) for asked in ("auto", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    for own, used in (("fp16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")):
        monkeypatch.setattr(Part, "dtype", lambda _, own=own: own)
        assert vae_precision("auto", vae) == used


class CrampedVae:
    """A real VAE on a card with room for `room` clips."""

    def __init__(self, real: Any, room: int) -> None:
        self.real, self.room, self.batches = real, room, []

    def encode(self, batch: torch.Tensor) -> Any:
        self.batches.append(len(batch))
        if len(batch) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.real.encode(batch)


@pytest.mark.parametrize(("room", "batches"), [(5, [5]), (3, [5, 2, 3]), (1, [5, 2, 1, 1, 3, 1, 2, 1, 1])])
def test_out_of_memory_halves_the_batch_and_loses_nothing(vae, room, batches):
    whole = encoder(vae).encode(clips(5, frames=5))
    cramped = encoder(vae)
    cramped._vae = CrampedVae(cramped._vae, room)
    torch.testing.assert_close(cramped.encode(clips(5, frames=5)), whole, rtol=1e-5, atol=1e-5)
    assert cramped._vae.batches == batches


def test_out_of_memory_with_one_clip_is_no_longer_hidden(vae):
    cramped = encoder(vae)
    cramped._vae = CrampedVae(cramped._vae, 0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        cramped.encode(clips(2, frames=5))


def test_only_the_encoder_half_is_kept(vae):
    assert encoder(vae)._vae.decoder is None


def test_a_texts_embedding_does_not_depend_on_its_batch(t5):
    texts = ["a grey rabbit yawns", "", "two children fly a red kite at dusk and then much more than fits"]
    together = t5.encode(texts)
    assert together.shape == (3, TEXT_LENGTH, 32)
    torch.testing.assert_close(together, torch.cat([t5.encode([text]) for text in texts]), rtol=1e-5, atol=1e-5)


def test_an_embedding_is_t5s_last_hidden_state_with_all_pads_and_no_mask(t5, pipeline):
    model = T5EncoderModel.from_pretrained(pipeline / "text_encoder").eval()
    tokenizer = load_tokenizer(str(pipeline / "tokenizer"))
    ids = tokenizer(["a bird"], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    assert ids.shape == (1, TEXT_LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(t5.encode(["a bird"]), model(ids)[0])


def test_t5_in_eight_bits_stays_close(pipeline, t5):
    part = pretrained_part(Model(pretrained_model_name_or_path=str(pipeline)), "text_encoder")
    small = TextEncoder(part, load_tokenizer(str(pipeline / "tokenizer")), "fp32", CPU, TEXT_LENGTH, int8=True)
    stored = [module for module in small._model.modules() if isinstance(module, QuantizedLinear)]
    assert len(stored) == 2 * 7 and all(module.weight.dtype == torch.int8 for module in stored)
    assert not any(isinstance(module, nn.Linear) for module in small._model.modules())
    texts = ["a grey rabbit yawns", ""]
    exact, close = t5.encode(texts), small.encode(texts)
    assert not torch.equal(exact, close)
    assert torch.nn.functional.cosine_similarity(exact.flatten(1), close.flatten(1)).min() > 0.99


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_t5_in_eight_bits_keeps_what_half_precision_cannot_hold(pipeline, tmp_path, precision):
    """T5's `wo` gives values beyond fp16's 65504, which transformers therefore computes in fp32."""
    shutil.copytree(pipeline / "text_encoder", tmp_path / "text_encoder")
    [weights] = (tmp_path / "text_encoder").glob("*.safetensors")
    tensors = load_file(weights)
    for name in tensors:
        tensors[name] *= 1e5 if "DenseReluDense.wo" in name else 10 if "DenseReluDense.wi_1" in name else 1
    save_file(tensors, weights, {"format": "pt"})
    part = Part(tmp_path / "text_encoder", None, (weights,))
    tokenizer = load_tokenizer(str(pipeline / "tokenizer"))
    texts = ["a grey rabbit yawns", ""]
    exact = TextEncoder(part, tokenizer, "fp32", CPU, TEXT_LENGTH)
    beyond = []
    exact._model.encoder.block[0].layer[1].DenseReluDense.wo.register_forward_hook(
        lambda _layer, _given, result: beyond.append(float(result.abs().max()))
    )
    wanted = exact.encode(texts).flatten(1)
    assert beyond[0] > 65504
    for int8 in (False, True):
        found = TextEncoder(part, tokenizer, precision, CPU, TEXT_LENGTH, int8=int8).encode(texts).float().flatten(1)
        assert torch.nn.functional.cosine_similarity(wanted, found).min() > 0.99, f"int8: {int8}"


def test_tokens_beyond_the_text_length_are_counted(pipeline):
    tokenizer = load_tokenizer(str(pipeline / "tokenizer"))
    text = "a grey rabbit yawns in the meadow " * 20
    [none, many] = truncated_tokens(tokenizer, ["a", text], TEXT_LENGTH)
    assert none == 0 and many == len(tokenizer(text).input_ids) - TEXT_LENGTH > 0
    assert truncated_tokens(tokenizer, [], TEXT_LENGTH) == []


def test_tokens_are_counted_a_block_of_captions_at_a_time(pipeline):
    tokenizer = load_tokenizer(str(pipeline / "tokenizer"))
    texts = [f"a grey rabbit {'yawns ' * (number % 30)}" for number in range(900)]
    blocks: list[int] = []

    def counting(block: list[str], **settings: object) -> Any:
        blocks.append(len(block))
        return tokenizer(block, **settings)

    expected = [max(0, len(tokenizer(text).input_ids) - TEXT_LENGTH) for text in texts[:60]]
    assert truncated_tokens(counting, texts, TEXT_LENGTH) == expected * 15
    assert sum(blocks) == 900 and max(blocks) <= 250


def test_conditioning_images_are_the_clean_frame_and_noised_copies_drawn_by_key():
    frame = clips(1)[0][:, :1]
    images = conditioning_images(frame, 200, "key")
    assert torch.equal(images[0], frame) and len(images) == 201
    again = conditioning_images(frame, 2, "key")
    assert all(torch.equal(one, two) for one, two in zip(images, again, strict=False))
    assert not torch.equal(images[1], conditioning_images(frame, 1, "other")[1])
    noises = [
        (image - frame) / (image - frame).std() for image in (*images[1:4], conditioning_images(frame, 1, "x")[1])
    ]
    for number, noise in enumerate(noises):
        assert abs(float(noise.mean())) < 0.1, "of the clean frame, not of the copy before"
        for other in noises[:number]:
            assert abs(float((noise * other).mean())) < 0.2, "each copy and each clip has noise of its own"
    sigmas = torch.tensor([float((image - frame).std()) for image in images[1:]]).log()
    assert abs(float(sigmas.mean()) + 3.0) < 0.15 and abs(float(sigmas.std()) - 0.5) < 0.1


def test_an_embedding_that_is_not_finite_stops_the_run():
    from precompute.prompts import encode_texts
    from shared.errors import DataError

    broken: Any = SimpleNamespace(encode=lambda texts: torch.full((len(texts), 2, 2), float("nan")))
    with pytest.raises(DataError, match="prompt 'a rabbit': T5 gives a non-finite embedding"):
        encode_texts(broken, {"0" * 32: "a rabbit"})
