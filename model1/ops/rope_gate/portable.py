"""Triton kernels for the end of attention, forward and backward.

A program is one warp with a few heads of one token: the token's angles serve all of them, and the
sum over a head's channels that the gate's gradient needs stays inside the warp.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.rope import Rotation
from model1.ops.rope_gate.pairs import rotate_pairs
from model1.ops.rounding import round_to


@dataclass(frozen=True)
class Config:
    """How the work is cut. Not yet measured."""

    block_elements: int = 2048  # plain channels per program, over as many heads as that gives
    num_warps: int = 1


@triton.jit(do_not_specialize=["h"])
def _inverse_rope_gate_fwd_kernel(
    out_ptr, stride_out_t, stride_out_h, cos_ptr, sin_ptr, gate_ptr, stride_gate_t, stride_gate_h,
    result_ptr, h,
    D: tl.constexpr, D_ROPE: tl.constexpr, HAS_GATE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROPE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    D_PLAIN: tl.constexpr = D - D_ROPE
    num_blocks = tl.cdiv(h, BLOCK_H)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    head = (tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    is_head = (head < h)[:, None]
    out_row = out_ptr + token * stride_out_t + head[:, None] * stride_out_h
    result_row = result_ptr + (token * h + head[:, None]) * D
    if HAS_GATE:
        gate_ptr += token * stride_gate_t + head * stride_gate_h
        gate = tl.load(gate_ptr, mask=head < h, other=0.0).to(tl.float32)[:, None]
    if D_PLAIN > 0:
        channel = tl.arange(0, BLOCK_D)[None]
        is_plain = is_head & (channel < D_PLAIN)
        plain = tl.load(out_row + channel, mask=is_plain, other=0.0).to(tl.float32)
        if HAS_GATE:
            plain *= gate
        tl.store(result_row + channel, round_to(plain, DTYPE, INTERPRETED), mask=is_plain)
    if D_ROPE > 0:
        turn = tl.arange(0, BLOCK_ROPE)[None]
        is_rope = is_head & (turn < D_ROPE)
        rope = tl.load(out_row + D_PLAIN + turn, mask=is_rope, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + token * D_ROPE + turn, mask=turn < D_ROPE, other=0.0)
        sin = tl.load(sin_ptr + token * D_ROPE + turn, mask=turn < D_ROPE, other=0.0)
        rope = rotate_pairs(rope, cos, -sin)
        if HAS_GATE:
            rope *= gate
        result = round_to(rope, DTYPE, INTERPRETED)
        tl.store(result_row + D_PLAIN + turn, result, mask=is_rope)


@triton.jit(do_not_specialize=["h"])
def _inverse_rope_gate_bwd_kernel(
    grad_ptr, out_ptr, stride_out_t, stride_out_h, cos_ptr, sin_ptr,
    gate_ptr, stride_gate_t, stride_gate_h, d_out_ptr, d_gate_ptr, h,
    D: tl.constexpr, D_ROPE: tl.constexpr, HAS_GATE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROPE: tl.constexpr,
):  # fmt: skip
    # the turned gradient gives both results: times the gate, and its product with out
    DTYPE: tl.constexpr = d_out_ptr.dtype.element_ty
    D_PLAIN: tl.constexpr = D - D_ROPE
    num_blocks = tl.cdiv(h, BLOCK_H)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    head = (tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    is_head = (head < h)[:, None]
    out_row = out_ptr + token * stride_out_t + head[:, None] * stride_out_h
    grad_row = (token * h + head[:, None]) * D
    d_gate = tl.zeros((BLOCK_H,), tl.float32)
    if HAS_GATE:
        gate_ptr += token * stride_gate_t + head * stride_gate_h
        gate = tl.load(gate_ptr, mask=head < h, other=0.0).to(tl.float32)[:, None]
    if D_PLAIN > 0:
        channel = tl.arange(0, BLOCK_D)[None]
        is_plain = is_head & (channel < D_PLAIN)
        plain = tl.load(grad_ptr + grad_row + channel, mask=is_plain, other=0.0).to(tl.float32)
        if HAS_GATE:
            value = tl.load(out_row + channel, mask=is_plain, other=0.0).to(tl.float32)
            d_gate += tl.sum(plain * value, axis=1)
            plain *= gate
        d_plain = round_to(plain, DTYPE, INTERPRETED)
        tl.store(d_out_ptr + grad_row + channel, d_plain, mask=is_plain)
    if D_ROPE > 0:
        turn = tl.arange(0, BLOCK_ROPE)[None]
        is_rope = is_head & (turn < D_ROPE)
        at = D_PLAIN + turn
        rope = tl.load(grad_ptr + grad_row + at, mask=is_rope, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + token * D_ROPE + turn, mask=turn < D_ROPE, other=0.0)
        sin = tl.load(sin_ptr + token * D_ROPE + turn, mask=turn < D_ROPE, other=0.0)
        rope = rotate_pairs(rope, cos, sin)
        if HAS_GATE:
            value = tl.load(out_row + at, mask=is_rope, other=0.0).to(tl.float32)
            d_gate += tl.sum(rope * value, axis=1)
            rope *= gate
        tl.store(d_out_ptr + grad_row + at, round_to(rope, DTYPE, INTERPRETED), mask=is_rope)
    if HAS_GATE:
        result = round_to(d_gate, d_gate_ptr.dtype.element_ty, INTERPRETED)
        tl.store(d_gate_ptr + token * h + head, result, mask=head < h)


def inverse_rope_gate_triton(
    out: Tensor, rotation: Rotation | None, gate: Tensor | None, config: Config | None = None
) -> Tensor:
    """See `model1.ops.rope_gate.inverse_rope_gate`."""
    result = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if result.numel() == 0:
        return result
    grid, inputs, constants = _launch_arguments(out, rotation, gate, config or Config())
    kernel: Any = _inverse_rope_gate_fwd_kernel
    with torch.cuda.device_of(out):
        kernel[grid](*inputs, result, out.shape[1], **constants)
    return result


def inverse_rope_gate_backward_triton(
    grad: Tensor, out: Tensor, rotation: Rotation | None, gate: Tensor | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of out and gate from a contiguous grad; the latter is empty without a gate."""
    d_out = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    shape, dtype = ((0,), out.dtype) if gate is None else (gate.shape, gate.dtype)
    d_gate = torch.empty(shape, dtype=dtype, device=out.device)
    if d_out.numel() == 0:
        return d_out, d_gate
    grid, inputs, constants = _launch_arguments(out, rotation, gate, config or Config())
    kernel: Any = _inverse_rope_gate_bwd_kernel
    with torch.cuda.device_of(out):
        kernel[grid](grad, *inputs, d_out, d_gate, out.shape[1], **constants)
    return d_out, d_gate


def _launch_arguments(
    out: Tensor, rotation: Rotation | None, gate: Tensor | None, config: Config
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, the arguments from out to the gate's strides, and the compile-time constants."""
    t, h, d = out.shape
    cos, sin = (out, out) if rotation is None else (a.contiguous() for a in rotation)
    gates = (out, 0, 0) if gate is None else (gate, *gate.stride())
    d_rope = 0 if rotation is None else cos.shape[1]
    constants = _constants(h, d, d_rope, gate is not None, config)
    constants |= {"INTERPRETED": knobs.runtime.interpret, "num_warps": config.num_warps}
    grid = (t * -(-h // constants["BLOCK_H"]),)
    return grid, (out, out.stride(0), out.stride(1), cos, sin, *gates), constants


def _constants(h: int, d: int, d_rope: int, has_gate: bool, config: Config) -> dict[str, Any]:
    block_d = triton.next_power_of_2(max(d - d_rope, d_rope))
    return {
        "D": d,
        "D_ROPE": d_rope,
        "HAS_GATE": has_gate,
        "BLOCK_H": max(1, min(config.block_elements // block_d, triton.next_power_of_2(h))),
        "BLOCK_D": block_d,
        "BLOCK_ROPE": triton.next_power_of_2(max(d_rope, 2)),
    }


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """MODEL1: 64 heads of 448 + 64 turned channels; V3.2: 128 heads of 128 channels, gate only."""
    signature = {
        "grad_ptr": "*bf16", "out_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32",
        "gate_ptr": "*bf16", "result_ptr": "*bf16", "d_out_ptr": "*bf16", "d_gate_ptr": "*bf16",
    }  # fmt: skip
    config = Config()
    cases = []
    for name, h, d, d_rope in (("model1", 64, 512, 64), ("v32", 128, 128, 0)):
        constants = _constants(h, d, d_rope, True, config)
        constants |= {
            "stride_out_t": h * d, "stride_out_h": d, "stride_gate_t": h, "stride_gate_h": 1,
            "h": h, "INTERPRETED": False,
        }  # fmt: skip
        for kernel, step in (
            (_inverse_rope_gate_fwd_kernel, "forward"),
            (_inverse_rope_gate_bwd_kernel, "backward"),
        ):
            cases.append(
                CompileCase(
                    name=f"inverse_rope_gate {step} {name}",
                    kernel=kernel,
                    signature=signature | dict.fromkeys(constants, "constexpr"),
                    constexprs=constants,
                    num_warps=config.num_warps,
                    num_stages=1,
                )
            )
    return cases
