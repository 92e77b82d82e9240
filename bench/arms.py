"""The ways to train that are compared: the reference script's inner loop, and each memory plan."""

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import restore_flash_attention_impl

from bench.models import build, conventions_for, make_pack
from bench.reference import predict_reference
from shared.model.geometry import Bucket
from train.objective import clip_loss
from train.transformer.attention import Backend, pinned
from train.transformer.engine import Engine, Plan, open_engine
from train.transformer.forward import predict

OURS = Plan("attention_output", compile=True)
OFFLOADED = replace(OURS, offload_activations=True)
LEAN = replace(OFFLOADED, stream_weights=2)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train."""

    plan: Plan | None
    """None is the reference: diffusers' forward, autocast, full checkpointing, peft."""
    compiled_reference: bool = False
    """The reference with cuDNN attention and its blocks compiled."""

    @property
    def compiles(self) -> bool:
        return self.compiled_reference or (self.plan is not None and self.plan.compile)


ARMS = {
    "reference": Arm(None),
    "reference, cuDNN, compiled": Arm(None, compiled_reference=True),
    "ours, full": Arm(replace(OURS, activations="full")),
    "ours, attention_output": Arm(OURS),
    "ours, attention_output again (A/A)": Arm(OURS),
    "ours, attention_output, not compiled": Arm(replace(OURS, compile=False)),
    "ours, block_input": Arm(replace(OURS, activations="block_input")),
    "ours, full, offloaded": Arm(replace(OFFLOADED, activations="full")),
    "ours, offloaded": Arm(OFFLOADED),
    "ours, lean": Arm(LEAN),
    "ours, offloaded, int8 base": Arm(replace(OFFLOADED, base_precision="int8")),
    "ours, offloaded, fp8 base": Arm(replace(OFFLOADED, base_precision="fp8")),
}
A_A = ("ours, attention_output", "ours, attention_output again (A/A)")
ON_THE_EXACT_BASE = [name for name, arm in ARMS.items() if arm.plan is None or arm.plan.base_precision == "model"]


@dataclass(frozen=True, slots=True)
class Case:
    """One model, one clip, one rank."""

    variant: str
    bucket: Bucket
    lora_rank: int
    arms: Sequence[str]
    soak_steps: int = 0
    """Steps of the lean arm at the end, during which memory must not grow."""


class Stage:
    """The device, which holds the model of one arm at a time; models of other base precisions stay in host memory."""

    def __init__(self, case: Case, transformer_config: dict[str, Any], device: torch.device) -> None:
        self.device, self._case, self._config = device, case, transformer_config
        self.conventions = conventions_for(transformer_config)
        self._models: dict[str, CogVideoXTransformer3DModel] = {}
        self._compiled: list[Any] = []
        """Compiled calls of the exact model's blocks, once an arm has compiled them."""
        self.clips = make_pack(self.conventions, [case.bucket], torch.bfloat16, device)
        self.targets = [torch.randn_like(clip.latents[:, : self.conventions.out_channels]) for clip in self.clips]
        self.kernel: Backend = "auto"
        """Attention kernel of the current arm."""

    def enter(self, arm: Arm) -> Callable[[], Tensor]:
        """Move what the arm keeps to the device, and nothing else; return its forward and backward pass."""
        precision = arm.plan.base_precision if arm.plan else "model"
        for name, model in self._models.items():
            model.zero_grad(set_to_none=True)
            if name != precision:
                nn.Module.to(model, "cpu")
        self._release()
        plan = arm.plan or Plan()
        if precision in self._models:
            plan = replace(plan, base_precision="model")  # quantized when it was built
        else:
            self._models[precision] = build(self._config, torch.bfloat16, self.device, self._case.lora_rank)
        self.model = self._models[precision]
        if self.device.type != "cuda":
            plan = replace(plan, compile=False)
        engine = open_engine(self.model, plan, self.device)
        self.kernel = engine.attention
        self._prepare_reference(arm)
        self._release()
        return lambda: self._pass(arm, engine)

    def _prepare_reference(self, arm: Arm) -> None:
        """Turn checkpointing and compiled blocks on for the reference, and off for a plan."""
        self.model.gradient_checkpointing = False
        for block in self.model.transformer_blocks:
            block._compiled_call_impl = None
        if arm.plan is not None:
            return
        restore_flash_attention_impl(_raise_warn=False)  # the reference does not have FlashAttention 3
        self.kernel = "auto"
        self.model.enable_gradient_checkpointing()
        if arm.compiled_reference:
            self.kernel = "cudnn" if self.device.type == "cuda" else "flash"
            if not self._compiled:
                for block in self.model.transformer_blocks:
                    block.compile(backend="inductor" if self.device.type == "cuda" else "eager", dynamic=False)
                self._compiled = [block._compiled_call_impl for block in self.model.transformer_blocks]
            for block, compiled in zip(self.model.transformer_blocks, self._compiled, strict=True):
                block._compiled_call_impl = compiled

    def _pass(self, arm: Arm, engine: Engine) -> Tensor:
        # checkpointing recomputes attention in the backward pass, which needs the same kernel
        with pinned(self.kernel) if arm.plan is None else nullcontext():
            if arm.plan is not None:
                velocities = predict(self.model, self.clips, self.conventions, engine)
            else:
                with torch.autocast(self.device.type, torch.bfloat16):
                    velocities = predict_reference(self.model, self.clips, self.conventions)
            losses = [clip_loss(*pair) for pair in zip(velocities, self.targets, strict=True)]
            loss = torch.stack(losses).mean()
            torch.autograd.backward(loss)
        return loss.detach()

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
