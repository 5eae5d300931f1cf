"""Calls of FP8 linear maps and of experts for `call_cases`: run, tensors, differentiable ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sparse_decode_cases import DEVICE, DTYPE
from torch import Tensor

from model1.ops.fp8_linear import fp8_linear
from model1.ops.moe import moe_experts, moe_route

BIG = DEVICE == "cuda"


def fp8_linear_call(seed: int) -> dict[str, Any]:
    """Sizes that "auto" would give to PyTorch's product on sm_90."""
    torch.manual_seed(seed)
    c, o = (1024, 512) if BIG else (40, 16)
    tensors = {"x": torch.randn(5, c).to(DEVICE, DTYPE), "weight": torch.randn(o, c).to(DEVICE)}

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return fp8_linear(x, weight, backend="triton")

    return {"run": run, "tensors": tensors, "differentiable": ("x", "weight")}


def moe_route_call(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    tensors = {"logits": torch.randn(5, 7).to(DEVICE), "balance_bias": torch.rand(7).to(DEVICE)}

    def run(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        return moe_route(**tensors, topk=3, scaling=2.5, backend="triton")

    return {"run": run, "tensors": tensors, "differentiable": ("logits",)}


def moe_experts_call(backend: str) -> Callable[[int], dict[str, Any]]:
    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        c, m, e = (512, 256, 16) if BIG else (16, 8, 4)
        sizes = {"x": (5, c), "weights": (5, 2), "gate_up": (e, 2 * m, c), "down": (e, c, m)}
        parts = {name: torch.randn(size).to(DEVICE, DTYPE) for name, size in sizes.items()}
        parts["weights"] = parts["weights"].float()
        ids = torch.stack([torch.randperm(e)[:2] for _ in range(5)]).to(DEVICE)

        def run(**tensors: Tensor) -> Tensor:
            return moe_experts(**tensors, swiglu_limit=10.0, backend=backend)

        return {
            "run": run, "tensors": parts | {"expert_ids": ids}, "differentiable": tuple(sizes)
        }  # fmt: skip

    return build
