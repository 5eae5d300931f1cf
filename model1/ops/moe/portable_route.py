"""Triton kernels for the choice of experts, forward and backward: a token's experts in registers.

A token's bits depend on its own logits alone.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options
from model1.ops.rounding import round_to

ENTRIES = 1024  # logits of a program of four warps; not measured yet


@triton.jit
def _affinity(logit):
    """softplus, kept above 1e-30, and its root."""
    # log1p(u) as log(w) u / (w - 1) with w = 1 + u: exact where u is lost in the sum
    u = tl.exp(-tl.abs(logit))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    softplus = tl.where(logit > 0, logit, 0.0) + log1p
    return softplus, tl.sqrt(tl.where(softplus < 1e-30, 1e-30, softplus))


@triton.jit(do_not_specialize=["t"])
def _route_kernel(
    logit_ptr, stride_t, stride_e, bias_ptr, weight_ptr, id_ptr, t, scaling,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    is_token, is_expert = token < t, expert < NUM_EXPERTS
    where = token.to(tl.int64)[:, None] * stride_t + expert.to(tl.int64)[None, :] * stride_e
    mask = is_token[:, None] & is_expert[None, :]
    logit = tl.load(logit_ptr + where, mask=mask, other=0.0).to(tl.float32)
    _, affinity = _affinity(logit)
    bias = tl.load(bias_ptr + expert, mask=is_expert, other=0.0).to(tl.float32)
    score = affinity + bias[None, :] + 0.0  # minus zero becomes zero
    # integers in the order of the scores, NaN first, then the lower expert of equal ones
    bits = tl.where(score != score, 0x7FC00000, score.to(tl.int32, bitcast=True))
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    key = order * 65536 + (65535 - expert)[None, :]
    lowest: tl.constexpr = -(2**62)
    key = tl.where(is_expert[None, :], key, lowest)
    choice = tl.arange(0, CHOICES)
    ids = tl.zeros((BLOCK_T, CHOICES), tl.int32)
    chosen = tl.zeros((BLOCK_T, CHOICES), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for number in range(TOPK):
        best = tl.max(key, axis=1)
        is_best = key == best[:, None]
        value = tl.sum(tl.where(is_best, affinity, 0.0), axis=1)
        which = tl.sum(tl.where(is_best, expert[None, :], 0), axis=1)
        is_here = (choice == number)[None, :]
        ids = tl.where(is_here, which[:, None], ids)
        chosen = tl.where(is_here, value[:, None], chosen)
        total += value
        key = tl.where(is_best, lowest, key)
    where = token.to(tl.int64)[:, None] * TOPK + choice[None, :]
    mask = is_token[:, None] & (choice < TOPK)[None, :]
    weight = chosen / tl.where(is_token, total, 1.0)[:, None] * scaling
    tl.store(weight_ptr + where, weight, mask=mask)
    tl.store(id_ptr + where, ids.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["t"])
def _route_back_kernel(
    grad_ptr, weight_ptr, id_ptr, logit_ptr, stride_t, stride_e, d_logit_ptr, t, scaling,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # with s the sum of the chosen g: d_g = (scaling grad - sum(grad weight)) / s
    DTYPE: tl.constexpr = d_logit_ptr.dtype.element_ty
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    is_token = token < t
    where = token.to(tl.int64)[:, None] * stride_t + expert.to(tl.int64)[None, :] * stride_e
    mask = is_token[:, None] & (expert < NUM_EXPERTS)[None, :]
    logit = tl.load(logit_ptr + where, mask=mask, other=0.0).to(tl.float32)
    softplus, affinity = _affinity(logit)
    row = token.to(tl.int64) * TOPK
    total = tl.zeros((BLOCK_T,), tl.float32)
    mean = tl.zeros((BLOCK_T,), tl.float32)
    d_chosen = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
    is_chosen = tl.zeros((BLOCK_T, EXPERTS), tl.int32)
    for number in range(TOPK):
        which = tl.load(id_ptr + row + number, mask=is_token, other=0).to(tl.int32)
        grad = tl.load(grad_ptr + row + number, mask=is_token, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + row + number, mask=is_token, other=0.0)
        is_it = expert[None, :] == which[:, None]
        d_chosen = tl.where(is_it, grad[:, None], d_chosen)
        is_chosen = tl.where(is_it, 1, is_chosen)
        total += tl.sum(tl.where(is_it, affinity, 0.0), axis=1)
        mean += grad * weight
    d_affinity = (scaling * d_chosen - mean[:, None]) / tl.where(is_token, total, 1.0)[:, None]
    slope = tl.where(softplus < 1e-30, 0.0, tl.sigmoid(logit) / (2.0 * affinity))
    d_logit = tl.where(is_chosen != 0, d_affinity * slope, 0.0)
    out = d_logit_ptr + token.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
    tl.store(out, round_to(d_logit, DTYPE, INTERPRETED), mask=mask)


def moe_route_triton(
    logits: Tensor, balance_bias: Tensor, *, topk: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.moe.moe_route`."""
    t, e = logits.shape
    weights = torch.empty(t, topk, dtype=torch.float32, device=logits.device)
    expert_ids = torch.empty(t, topk, dtype=torch.int64, device=logits.device)
    if t == 0:
        return weights, expert_ids
    constants = _constants(e, topk)
    kernel: Any = _route_kernel
    with torch.cuda.device_of(logits):
        kernel[(-(-t // constants["BLOCK_T"]),)](
            logits, logits.stride(0), logits.stride(1), balance_bias.contiguous(), weights,
            expert_ids, t, scaling, CHOICES=triton.next_power_of_2(topk), **constants,
            **launch_options(4, 1),
        )  # fmt: skip
    return weights, expert_ids


def moe_route_backward_triton(
    grad: Tensor, weights: Tensor, expert_ids: Tensor, logits: Tensor, *, scaling: float
) -> Tensor:
    """The gradient of the logits [t, e], in their dtype; zero for experts that were not chosen."""
    t, e = logits.shape
    d_logits = torch.empty(t, e, dtype=logits.dtype, device=logits.device)
    if t == 0:
        return d_logits
    constants = _constants(e, expert_ids.shape[1])
    kernel: Any = _route_back_kernel
    with torch.cuda.device_of(logits):
        kernel[(-(-t // constants["BLOCK_T"]),)](
            grad.contiguous(), weights, expert_ids, logits, logits.stride(0), logits.stride(1),
            d_logits, t, scaling, INTERPRETED=knobs.runtime.interpret, **constants,
            **launch_options(4, 1),
        )  # fmt: skip
    return d_logits


def _constants(num_experts: int, topk: int) -> dict[str, int]:
    experts = int(triton.next_power_of_2(num_experts))
    return {
        "NUM_EXPERTS": num_experts, "TOPK": topk, "EXPERTS": experts,
        "BLOCK_T": max(1, ENTRIES // experts),
    }  # fmt: skip


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Six of 64 experts, and eight of 256."""
    cases = []
    for e, topk in ((64, 6), (256, 8)):
        constants: dict[str, Any] = _constants(e, topk) | {"stride_t": e, "stride_e": 1}
        for name, kernel in (("route", _route_kernel), ("route back", _route_back_kernel)):
            known = constants | {"CHOICES": triton.next_power_of_2(topk), "INTERPRETED": False}
            known = {k: v for k, v in known.items() if k in kernel.arg_names}
            types = {k: "*fp32" if k.endswith("_ptr") else "i32" for k in kernel.arg_names}
            types |= {"id_ptr": "*i64", "scaling": "fp32"} | dict.fromkeys(known, "constexpr")
            cases.append(CompileCase(f"{name} {topk} of {e}", kernel, types, known, 4, 1))
    return cases
