"""Routed experts whose weights are FP8 with block scales: for inference, without gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.fp8_linear import quantize_weight
from model1.ops.fp8_linear.choice import fp8_refusal
from model1.ops.moe.checks import check_experts, check_kernel_experts
from model1.ops.moe.dispatch import EXPERTS_FP8


class Fp8Experts(NamedTuple):
    """The matrices [e, n, k] of all experts, one scale per block of 128 x 128."""

    w_fp8: Tensor  # [e, n, k] float8_e4m3fn
    w_scale: Tensor  # [e, ceil(n/128), ceil(k/128) up to a multiple of 4] fp32


def quantize_experts(
    weight: Tensor, *, scale_format: str = "ue8m0", backend: str = "auto"
) -> Fp8Experts:
    """Weights [e, n, k] as `model1.ops.fp8_linear.quantize_weight` quantises each."""
    if weight.dim() != 3 or weight.shape[0] == 0:
        raise ValueError(f"weight must be [e, n, k], e > 0, got {list(weight.shape)}")
    parts = [quantize_weight(w, scale_format=scale_format, backend=backend)[:2] for w in weight]
    return Fp8Experts(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))


def moe_experts_fp8(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up: Fp8Experts,
    down: Fp8Experts,
    *,
    swiglu_limit: float | None,
    backend: str = "auto",
) -> Tensor:
    """`model1.ops.moe.moe_experts` on FP8 matrix units: [t, c] in the dtype of x, no gradient.

    x, and silu(gate) up times the weight of the choice, are rounded to the dtype of x and quantised
    to e4m3 in groups of 128 with power-of-two scales; products and sums are fp32. gate_up: of
    [e, 2*m, c]; down: of [e, c, m]. A token's bits depend on its own row, weights and ids alone.

    Backends ref, which emulates, and triton. Raises ValueError for shapes, dtypes and devices that
    do not fit and for x that needs a gradient, BackendUnavailable on a GPU without FP8 units.
    """
    check_experts(x, weights, expert_ids, gate_up.w_fp8, down.w_fp8)
    check_kernel_experts(x, weights, expert_ids, gate_up.w_fp8, down.w_fp8, "triton")
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        raise ValueError("x and weights must not need gradients: moe_experts_fp8 has none")
    for name, part in (("gate_up", gate_up), ("down", down)):
        _check_codes(name, part, x)
    if backend != "ref" and (refusal := fp8_refusal(x.device)):
        raise BackendUnavailable(f"moe_experts_fp8/{backend} {refusal}")
    name = EXPERTS_FP8.resolve(backend, x.device)
    arguments = x, weights, expert_ids, *gate_up, *down, swiglu_limit, name
    return torch.ops.model1.moe_experts_fp8(*arguments)


def _check_codes(name: str, part: Fp8Experts, x: Tensor) -> None:
    codes, scale = part
    if codes.dtype != torch.float8_e4m3fn or not codes.is_contiguous():
        rule = f"{name}.w_fp8 must be float8_e4m3fn, contiguous"
        raise ValueError(f"{rule}, got {codes.dtype}, {codes.stride()}")
    e, n, k = codes.shape
    shape = (e, -(-n // 128), -(-k // 512) * 4)
    if scale.shape != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
        rule = f"{name}.w_scale must be {list(shape)} float32, contiguous"
        raise ValueError(f"{rule}, got {list(scale.shape)} {scale.dtype}, {scale.stride()}")
    if scale.device != x.device:
        raise ValueError(f"{name}.w_scale must be on x's device {x.device}, got {scale.device}")
