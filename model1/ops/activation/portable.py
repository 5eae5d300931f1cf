"""Triton kernels for SwiGLU, forward and backward, bound by memory.

A program takes a tile of a few rows by some channels; every input is read once, every result
written once. Rows may lie anywhere: halves of one tensor are read, and their gradients written,
where they are.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options
from model1.ops.rounding import round_to


@dataclass(frozen=True)
class Config:
    """How the work is cut. Not yet measured."""

    elements: int = 2048  # of a program's tile
    num_warps: int = 4


@triton.jit
def _tile(num_rows, m, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row numbers [BLOCK_R, 1], channels [1, BLOCK_M] and which of the tile exist."""
    num_blocks = tl.cdiv(m, BLOCK_M)
    row = (tl.program_id(0) // num_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    channel = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)[None]
    return row, channel, (row < num_rows) & (channel < m)


@triton.jit
def _clamped(gate, up, limit, HAS_LIMIT: tl.constexpr):
    """Both behind their clamps; comparisons with NaN are false, so that it stays."""
    if HAS_LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_fwd_kernel(
    gate_ptr, stride_gate, up_ptr, stride_up, out_ptr, num_rows, m, limit,
    HAS_LIMIT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row, channel, mask = _tile(num_rows, m, BLOCK_R, BLOCK_M)
    gate_at, up_at = gate_ptr + row * stride_gate + channel, up_ptr + row * stride_up + channel
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_at, mask=mask, other=0.0).to(tl.float32)
    gate, up = _clamped(gate, up, limit, HAS_LIMIT)
    out = gate / (1.0 + tl.exp(-gate)) * up
    out = round_to(out, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + row * m + channel, out, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_bwd_kernel(
    grad_ptr, stride_grad, gate_ptr, stride_gate, up_ptr, stride_up,
    d_gate_ptr, d_up_ptr, stride_d, num_rows, m, limit,
    HAS_LIMIT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = d_gate_ptr.dtype.element_ty
    row, channel, mask = _tile(num_rows, m, BLOCK_R, BLOCK_M)
    gate_at, up_at = gate_ptr + row * stride_gate + channel, up_ptr + row * stride_up + channel
    grad_at = grad_ptr + row * stride_grad + channel
    raw_gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    raw_up = tl.load(up_at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
    gate, up = _clamped(raw_gate, raw_up, limit, HAS_LIMIT)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    d_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = grad * gate * sigmoid
    if HAS_LIMIT:  # as PyTorch's clamp: the bounds themselves pass, NaN does not
        d_gate = tl.where(raw_gate <= limit, d_gate, 0.0)
        d_up = tl.where((raw_up >= -limit) & (raw_up <= limit), d_up, 0.0)
    at = row * stride_d + channel
    tl.store(d_gate_ptr + at, round_to(d_gate, DTYPE, INTERPRETED), mask=mask)
    tl.store(d_up_ptr + at, round_to(d_up, DTYPE, INTERPRETED), mask=mask)


def swiglu_triton(
    gate: Tensor, up: Tensor | None, limit: float | None, config: Config | None = None
) -> Tensor:
    """See `model1.ops.activation.swiglu`."""
    m = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    out = torch.empty((*gate.shape[:-1], m), dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    gate, up = _halves(gate, up)
    kernel: Any = _swiglu_fwd_kernel
    with torch.cuda.device_of(gate):
        kernel[_grid(gate, config or Config())](
            gate, gate.stride(0), up, up.stride(0), out, len(gate), m, limit or 0.0,
            **_options(m, limit is not None, config or Config()),
        )  # fmt: skip
    return out


def swiglu_backward_triton(
    grad: Tensor, gate: Tensor, up: Tensor | None, limit: float | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of gate and up; without up that of both in one tensor, and an empty one."""
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    d_up = torch.empty((0,) if up is None else up.shape, dtype=gate.dtype, device=gate.device)
    if d_gate.numel() == 0:
        return d_gate, d_up
    first, second = _halves(d_gate, None) if up is None else _halves(d_gate, d_up)
    (gate, up), grad = _halves(gate, up), _rows(grad)
    m = gate.shape[1]
    kernel: Any = _swiglu_bwd_kernel
    with torch.cuda.device_of(gate):
        kernel[_grid(gate, config or Config())](
            grad, grad.stride(0), gate, gate.stride(0), up, up.stride(0),
            first, second, first.stride(0), len(gate), m, limit or 0.0,
            **_options(m, limit is not None, config or Config()),
        )  # fmt: skip
    return d_gate, d_up


def _rows(x: Tensor) -> Tensor:
    """x as [rows, m] with neighbouring channels, a copy only where it does not lie so."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as [rows, m], views of the one tensor where up is None."""
    if up is not None:
        return _rows(gate), _rows(up)
    first, second = _rows(gate).chunk(2, dim=1)
    return first, second


def _blocks(m: int, config: Config) -> tuple[int, int]:
    """Rows and channels of a tile; the widest one that leaves at most an eighth of it empty."""
    widest = min(config.elements, 1 << (m - 1).bit_length())
    block_m = next(
        (n for n in (widest >> i for i in range(4)) if n >= 64 and -m % n * 8 <= m), widest
    )
    return config.elements // block_m, block_m


def _grid(gate: Tensor, config: Config) -> tuple[int]:
    block_r, block_m = _blocks(gate.shape[1], config)
    return (-(-gate.shape[0] // block_r) * -(-gate.shape[1] // block_m),)


def _options(m: int, has_limit: bool, config: Config) -> dict[str, Any]:
    block_r, block_m = _blocks(m, config)
    constants = {"HAS_LIMIT": has_limit, "INTERPRETED": knobs.runtime.interpret}
    blocks = {"BLOCK_R": block_r, "BLOCK_M": block_m}
    return constants | blocks | launch_options(config.num_warps, 1)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rows of 2 x 11008 channels side by side, with clamps."""
    m, config = 11008, Config()
    block_r, block_m = _blocks(m, config)
    constants = {
        "stride_gate": 2 * m, "stride_up": 2 * m, "stride_d": 2 * m, "stride_grad": m, "m": m,
        "HAS_LIMIT": True, "INTERPRETED": False, "BLOCK_R": block_r, "BLOCK_M": block_m,
    }  # fmt: skip
    pointers = ("grad_ptr", "gate_ptr", "up_ptr", "out_ptr", "d_gate_ptr", "d_up_ptr")
    signature = {**dict.fromkeys(pointers, "*bf16"), "num_rows": "i32", "limit": "fp32"}
    cases = []
    for kernel, name in ((_swiglu_fwd_kernel, "forward"), (_swiglu_bwd_kernel, "backward")):
        own = {x: value for x, value in constants.items() if x in kernel.arg_names}
        cases.append(
            CompileCase(
                name=f"swiglu {name}",
                kernel=kernel,
                signature=signature | dict.fromkeys(own, "constexpr"),
                constexprs=own,
                num_warps=config.num_warps,
                num_stages=1,
            )
        )
    return cases
