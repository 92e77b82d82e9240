"""Bind one training step of every variant on a CUDA build of torch without a card: `make test-cuda-build`.

Fake CUDA tensors carry shape, dtype and device through the real code: an operator that is missing, or called with wrong
shapes or on two devices, fails here. Matrix products of two dtypes do not: a test on the CPU finds those. Nothing is
computed, and streams are stand-ins, so no value, speed or order of copies is checked. For the compiled functions
Inductor generates Triton code for an H100, which is not compiled further. It needs a C compiler.
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
from types import SimpleNamespace
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
from train.transformer.compiled import compiled_kernels
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
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)
"""What Inductor asks of a card; NVIDIA's data sheet."""
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

    card = {"is_available": lambda: False, "get_device_capability": lambda *_: (9, 0)}
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


def triton_sources(dtype: torch.dtype) -> list[str]:
    """Return the Triton code that Inductor generates for the compiled functions' forward and backward passes."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    sources = []

    def lower(module: Any, inputs: Any) -> Any:
        mode: Any = torch._guards.detect_fake_mode(inputs)
        graph = GraphLowering(module, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            sources.append(graph.codegen()[0].value)
        return make_boxed_func(module.forward)

    backend: Any = aot_autograd(fw_compiler=lower, bw_compiler=lower, decompositions=select_decomp_table())
    card = {"get_device_properties": H100, "current_device": 0, "get_compute_capability": 90, "is_available": True}
    stand_ins: Any = {name: staticmethod(lambda *_, value=value: value) for name, value in card.items()}
    seen = patch.multiple(torch.cuda, get_device_properties=lambda *_: H100, current_device=lambda: 0)
    asked = patch("torch.utils._triton.triton_hash_with_backend", lambda: "none")
    with without_driver(), FakeTensorMode(), patch.multiple(CudaInterface, **stand_ins), seen, asked:
        torch.ones(1, device=CUDA, requires_grad=True).exp()  # torch prepares its streams, for no device
        with devices():
            compiled_kernels(backend).try_on(CUDA, dtype)
    torch._dynamo.reset()
    return sources


def main() -> int:
    """Print one line per variant, plan and attention kernel; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
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
    for dtype in (torch.bfloat16, torch.float16):
        try:
            sources = triton_sources(dtype)
            kernels = sum(source.count("@triton.jit") for source in sources)
            assert kernels >= len(sources) == 6, f"{kernels} kernels in {len(sources)} passes"
            for source in sources:
                compile(source, "generated", "exec")
        except Exception:
            failed += 1
            traceback.print_exc()
        else:
            print(f"{dtype}: Triton code of {kernels} kernels generated for {len(sources)} passes")
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
