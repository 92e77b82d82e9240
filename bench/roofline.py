"""Rates that this device reaches on the parts of a step: matrix product, each attention kernel, copies."""

import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch.nn.attention import restore_flash_attention_impl
from torch.nn.functional import scaled_dot_product_attention

from shared.errors import UsageError
from train.transformer.attention import Backend, choose_backend, pinned

Clock = Callable[[Callable[[], Any]], float]
"""Returns the median seconds of an action."""


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of `action`, by CUDA events on a GPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        action()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    action()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def measure_roofline(
    device: torch.device, tokens: int, heads: int, side: int = 8192, copied_bytes: int = 10**9, repeats: int = 10
) -> dict[str, Any]:
    """Measure a `side`^3 product, attention over [1,heads,tokens,64] and copies from and to pinned memory.

    Rates are TFLOP/s in bf16 and GB/s. Data is random: zeros draw less power and run faster.
    """

    def seconds(action: Callable[[], Any]) -> float:
        action(), action()
        return statistics.median(timed(action, device) for _ in range(repeats))

    result: dict[str, Any] = {"matmul_tflops": _matmul_tflops(device, side, seconds)}
    result |= _copies(device, copied_bytes, seconds)
    result["attention"] = {}
    kernels: list[Backend] = [kernel for kernel in get_args(Backend) if kernel not in ("auto", "math")]
    for kernel in kernels:  # math keeps all scores
        result["attention"][kernel] = _attention(kernel, device, tokens, heads, seconds)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _matmul_tflops(device: torch.device, side: int, seconds: Clock) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right) / 1e12


def _copies(device: torch.device, num_bytes: int, seconds: Clock) -> dict[str, float]:
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return {
        "device_to_host_gb_per_s": num_bytes / 1e9 / seconds(lambda: host.copy_(there, non_blocking=True)),
        "host_to_device_gb_per_s": num_bytes / 1e9 / seconds(lambda: there.copy_(host, non_blocking=True)),
    }


def _attention(
    kernel: Backend, device: torch.device, tokens: int, heads: int, seconds: Clock
) -> dict[str, float] | str:
    """Measure one kernel, or return why the kernel does not run here."""
    shape = (1, heads, tokens, 64)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    gradient, flops = torch.randn_like(query), 4 * tokens**2 * heads * 64
    try:
        choose_backend(kernel, device, torch.bfloat16, heads, 64)  # replaces FlashAttention 2 by 3, or fails
        with pinned(kernel):
            attended = scaled_dot_product_attention(query, key, value)
            forward = seconds(lambda: scaled_dot_product_attention(query, key, value))
            inputs = (query, key, value)
            backward = seconds(lambda: torch.autograd.grad(attended, inputs, gradient, retain_graph=True))
    except (RuntimeError, UsageError) as error:
        return str(error).splitlines()[0]
    finally:
        restore_flash_attention_impl(_raise_warn=False)
    return {"forward_tflops": flops / forward / 1e12, "backward_tflops": 2.5 * flops / backward / 1e12}
