"""Stage 1 on a CUDA GPU with encoders of the published size and random weights: clips per second, who waited, memory.

    python bench/gpu_precompute.py        # writes bench/results/gpu_precompute.json and .md

Random weights cost what trained ones do; only the encoded content means nothing. Without a CUDA GPU it ends with 2.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.precompute import RESULTS, write_corpus  # noqa: E402

VAE = {
    "block_out_channels": [128, 256, 256, 512],
    "layers_per_block": 3,
    "latent_channels": 16,
    "temporal_compression_ratio": 4,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 0.7,
}
"""The published `vae/config.json`, where it differs from the class's defaults or decides the cost."""
T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""T5 v1.1 XXL."""


def save_encoders(folder: Path) -> Path:
    """The tiny pipeline's layout with encoders of the real size in bf16, made on the GPU."""
    import shutil

    import torch
    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5Config, T5EncoderModel

    shutil.copytree(ROOT / "demo" / "tiny", folder)
    for name in ("vae", "text_encoder"):
        shutil.rmtree(folder / name)
    with torch.device("cuda"):
        AutoencoderKLCogVideoX(**VAE).to(torch.bfloat16).save_pretrained(folder / "vae")
        T5EncoderModel(T5Config(**T5)).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {"max_text_seq_length": 226, "text_embed_dim": T5["d_model"]}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    torch.cuda.empty_cache()
    return folder


ARMS: tuple[dict[str, Any], ...] = (
    {},
    {"enable_tiling": True},
    {"channels_last": True},
    {"compile_vae": True},
    {"text_quantization": "int8"},
)


def measure(pipeline: Path, root: Path, cache: Path, arm: dict[str, Any], batch: int) -> dict[str, Any]:
    """One run of stage 1 into an empty cache."""
    import torch

    from precompute.plan import Part
    from precompute.run import precompute
    from shared.config import Config
    from shared.preemption import StopSignal

    config = Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(pipeline)},
            "data": {
                "name": "bench",
                "instance_data_root": root,
                "caption_column": "prompts.txt",
                "video_column": "videos.txt",
                "fps": 0,
                "frame_buckets": [49],
                "resolution_buckets": [[480, 720]],
            },
            "precompute": {
                "cache": str(cache),
                "device": "cuda",
                "decode_workers": 8,
                "clips_per_shard": 16,
                "vae_batch_size": batch,
                **arm,
            },
            "train": {"output_dir": "runs/bench"},
        }
    )
    torch.cuda.reset_peak_memory_stats()
    report = precompute(config, Part(), StopSignal())
    seconds = report.seconds
    total = seconds["video_pass"]
    return {
        "arm": ", ".join(f"{name} = {value}" for name, value in arm.items()) or "plain",
        "batch": batch,
        "clips": report.latents.made,
        "clips_per_second": round(report.latents.made / total, 3),
        "prompts_per_second": round(report.prompts.made / seconds["encode_prompts"], 1),
        "share_waiting_for_decode": round(seconds["wait_for_decode"] / total, 3),
        "share_waiting_for_write": round(seconds["wait_for_write"] / total, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("bench/gpu_precompute.py needs a CUDA GPU; none is here")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        pipeline, root = save_encoders(Path(scratch) / "pipeline"), Path(scratch) / "clips"
        write_corpus(root, arguments.clips, 480, 720, 49)
        warm = Path(scratch) / "warm"
        write_corpus(warm, 2, 480, 720, 49)
        measure(pipeline, warm, Path(scratch) / "cache-warm", {}, arguments.batch)
        rows = [
            measure(pipeline, root, Path(scratch) / f"cache-{number}", arm, arguments.batch)
            for number, arm in enumerate(ARMS)
        ]
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bucket": "49x480x720",
        "runs": rows,
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gpu_precompute.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "gpu_precompute.md").write_text("\n".join([f"{result['device']}, 49x480x720", "", *lines]) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
