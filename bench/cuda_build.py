"""Bind one training step of every variant on a CUDA build of torch without a card: `make test-cuda-build`.

Fake CUDA tensors carry shape, dtype and device through the real code: an operator that is missing, or called with wrong
shapes or on two devices, fails here. Matrix products of two dtypes do not: a test on the CPU finds those. Nothing is
computed, and streams are stand-ins, so no value, speed or order of copies is checked. It needs a C compiler.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.models import PUBLISHED, conventions_for
from shared.config import Train
from shared.model.geometry import Bucket
from train.memory.simulation import blank_clip, flash_on_meta
from train.objective import clip_loss
from train.transformer.engine import Plan, open_engine
from train.transformer.forward import predict
from train.transformer.load import add_adapter
from train.transformer.positions import forget_tables

CUDA = torch.device("cuda", 0)
DRIVER = """
signed char count = 0;
signed char _ZN3c104cuda12device_countEv(void) { return count; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = *active = 0; return 0; }
"""
"""Stands for libcuda.so.1: the autograd engine asks each of `count` devices whether it has a context."""
NAME, MANY = "libcuda.so.1", 127
SHORT, LONG = Bucket(49, 480, 720), Bucket(81, 768, 1360)
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[Bucket, ...], torch.dtype]] = {
    "2b": ("2b", {}, (SHORT, Bucket(9, 480, 720)), torch.float16),
    "5b": ("5b", {}, (SHORT, Bucket(9, 480, 720)), torch.bfloat16),
    "5b-i2v": ("5b", {"in_channels": 32, "use_learned_positional_embeddings": True}, (SHORT,), torch.bfloat16),
    "1.5-5b": ("1.5-5b", {}, (LONG, Bucket(17, 480, 720)), torch.bfloat16),
    "1.5-5b-i2v": ("1.5-5b", {"in_channels": 32, "ofs_embed_dim": 512}, (LONG,), torch.bfloat16),
}
"""Published config, what the variant changes in it, the pack, the dtype."""
PLANS = {
    "block_input": Plan("block_input"),
    "attention_output": Plan("attention_output"),
    "full": Plan("full"),
    "offload": Plan("attention_output", full_blocks=1, offload_activations=True),
    "streamed": Plan("block_input", offload_activations=True, stream_weights=2),
    "int8": Plan("attention_output", base_precision="int8"),
    "fp8": Plan("attention_output", base_precision="fp8"),
}


def efficient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention's output by the operation of the backend "efficient"."""
    output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
    return output


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention's output by the operation of the backend "cudnn"."""
    output: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[0]
    return output


KERNELS = {"flash": flash_on_meta, "efficient": efficient, "cudnn": cudnn}


@contextmanager
def without_driver() -> Iterator[None]:
    """Replace what asks the driver (streams, the card), and torch's swap of parameters, which fake tensors refuse."""

    def swap(one: Tensor, other: Tensor) -> None:
        one.data = other.data

    card = {"is_available": lambda: False, "get_device_capability": lambda _: (9, 0)}
    streams = {"Stream": MagicMock(), "current_stream": MagicMock(), "stream": lambda _: nullcontext()}
    with patch.multiple(torch.cuda, **card, **streams), patch("torch.utils.swap_tensors", swap):
        yield


@contextmanager
def devices() -> Iterator[None]:
    """Let the autograd engine find devices, all without a context."""
    count = ctypes.c_int8.in_dll(ctypes.CDLL(NAME), "count")
    count.value = MANY
    try:
        yield
    finally:
        count.value = 0


def pageable(num_bytes: int, device: torch.device) -> Tensor:
    """Return [num_bytes] uint8 on the host, not pinned."""
    del device
    return torch.empty(num_bytes, dtype=torch.uint8)


def bind(variant: str, plan: Plan, kernel: str) -> None:
    """Run forward and backward pass, clipping and AdamW of three blocks of the real width; raise what torch raises."""
    name, changes, pack, dtype = VARIANTS[variant]
    shape = PUBLISHED[name] | changes | {"num_layers": 3}
    conventions = conventions_for(shape)
    forget_tables()
    with without_driver(), FakeTensorMode():
        with CUDA:
            transformer = CogVideoXTransformer3DModel.from_config(shape)
            nn.Module.to(transformer.requires_grad_(False), dtype)
            add_adapter(transformer, Train(output_dir=Path("unused"), lora_rank=64, lora_alpha=64))
        transformer.train()
        engine = open_engine(transformer, replace(plan, attention="math"), CUDA, pageable)
        clips = [blank_clip(bucket, conventions, dtype, CUDA) for bucket in pack]
        predictions = predict(transformer, clips, conventions, replace(engine, attention_kernel=KERNELS[kernel]))
        losses = [clip_loss(found, torch.zeros_like(found, dtype=torch.float32)) for found in predictions]
        with devices():
            torch.autograd.backward(torch.stack(losses).sum())
        trained = [value for value in transformer.parameters() if value.requires_grad]
        for value in trained:
            assert value.grad is not None and (value.grad.device, value.grad.dtype) == (CUDA, torch.float32)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        torch.optim.AdamW(trained).step()
    forget_tables()


def main() -> int:
    """Print one line per variant, plan and attention kernel; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    if torch.version.cuda is None:
        print(f"torch {torch.__version__} is a CPU build; install a CUDA build")
        return 1
    failed = 0
    for variant in options.variants:
        cells = [(name, "flash") for name in PLANS] + [("attention_output", "efficient"), ("attention_output", "cudnn")]
        for name, kernel in cells:
            try:
                bind(variant, PLANS[name], kernel)
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"{variant:11} {name:17} {kernel:10} failed")
            else:
                print(f"{variant:11} {name:17} {kernel:10} bound")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}: {failed} failed")
    return min(failed, 1)


def main_with_driver() -> int:
    """Build the stand-in of the driver and run `main` in a process that loads it first."""
    with TemporaryDirectory() as folder:
        library = Path(folder, NAME)
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{NAME}", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=DRIVER, text=True, check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": folder}
        return subprocess.run([sys.executable, "-m", "bench.cuda_build", *sys.argv[1:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main() if NAME in os.environ.get("LD_PRELOAD", "") else main_with_driver())
