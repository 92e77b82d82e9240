"""Make demo/tiny: a small CogVideoX pipeline of real diffusers and transformers classes with random weights.

The folder has the layout of the hub repositories, so the real `from_pretrained` code loads it. Run it to renew the
committed folder: `.venv/bin/python demo/make_tiny.py`.
"""

import io
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

HERE = Path(__file__).parent
TEXT_LENGTH = 226


def make_tokenizer(captions: list[str]) -> T5Tokenizer:
    """Return a sentencepiece model trained on the captions, in T5's id layout: pad 0, end 1, unknown 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    with TemporaryDirectory() as folder:
        Path(folder, "spiece.model").write_bytes(model.getvalue())
        return T5Tokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)


def make_pipeline(captions: list[str]) -> CogVideoXPipeline:
    """Build a transformer like CogVideoX-2B's at a hundredth of its width, with the same weights on every run."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(captions)
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=64,
        sample_width=96,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        time_embed_dim=64,
        text_embed_dim=64,
        max_text_seq_length=TEXT_LENGTH,
        sample_height=8,
        sample_width=12,
        sample_frames=17,
    )
    scheduler = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )
    return CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


def main() -> None:
    captions = (HERE / "clips" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    shutil.rmtree(HERE / "tiny", ignore_errors=True)
    make_pipeline(captions).save_pretrained(HERE / "tiny", safe_serialization=True)


if __name__ == "__main__":
    main()
