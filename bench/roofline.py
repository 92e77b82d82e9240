"""What this very card reaches on the parts of a step: matrix product, attention of each kernel, copies."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from train.attention import KERNELS, pinned


def measure_roofline(device: torch.device, tokens: int, heads: int, repeats: int = 10) -> dict[str, Any]:
    """TFLOP/s in bf16 of an 8192^3 product and of attention over [1,heads,tokens,64], GB/s from and to pinned memory.

    Random data: zeros draw less power and run faster.
    """

    def seconds(action: Callable[[], Any]) -> float:
        action(), action()
        found = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000)
        return statistics.median(found)

    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    result: dict[str, Any] = {"matmul_tflops": 2 * 8192**3 / seconds(lambda: left @ right) / 1e12, "attention": {}}
    gigabyte = torch.empty(10**9, dtype=torch.uint8, device=device).random_()
    host = torch.empty(10**9, dtype=torch.uint8, pin_memory=True)
    result["device_to_host_gb_per_s"] = 1 / seconds(lambda: host.copy_(gigabyte, non_blocking=True))
    result["host_to_device_gb_per_s"] = 1 / seconds(lambda: gigabyte.copy_(host, non_blocking=True))
    shape = (1, heads, tokens, 64)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    gradient, flops = torch.randn_like(query), 4 * tokens**2 * heads * 64
    for name in KERNELS:
        if name == "math":  # keeps all scores
            continue
        try:
            with pinned(name):  # type: ignore[arg-type]
                attended = scaled_dot_product_attention(query, key, value)
                forward = seconds(lambda: scaled_dot_product_attention(query, key, value))
            inputs = (query, key, value)
            backward = seconds(
                lambda: torch.autograd.grad(attended, inputs, gradient, retain_graph=True)  # noqa: B023
            )
        except RuntimeError as error:
            result["attention"][name] = str(error).splitlines()[0]
        else:
            tflops = {"forward_tflops": flops / forward / 1e12, "backward_tflops": 2.5 * flops / backward / 1e12}
            result["attention"][name] = tflops
    torch.cuda.empty_cache()
    return result
