"""Triton kernels that turn the last channels of heads, behind their norm if wanted.

A program is one warp with a few heads of one token: the token's angles serve all of them, and the
sums over a head's channels that the norm needs stay inside the warp.
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
from model1.ops.launch import launch_options
from model1.ops.rope.angles import Rotation
from model1.ops.rope_gate.pairs import rotate_pairs
from model1.ops.rounding import round_to


@dataclass(frozen=True)
class Config:
    """How the work is cut. Not yet measured."""

    block_elements: int = 2048  # plain channels per program, over as many heads as that gives
    num_warps: int = 1


@triton.jit
def _head(ptr, channel, mask):
    return tl.load(ptr + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["h", "norm_eps"])
def _rotate_tail_fwd_kernel(
    x_ptr, stride_x_t, stride_x_h, cos_ptr, sin_ptr, out_ptr, h, norm_eps,
    D: tl.constexpr, D_ROPE: tl.constexpr, INVERSE: tl.constexpr, HAS_NORM: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    D_PLAIN: tl.constexpr = D - D_ROPE
    num_blocks = tl.cdiv(h, BLOCK_H)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    head = (tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    row = x_ptr + token * stride_x_t + head * stride_x_h
    out_row = out_ptr + (token * h + head) * D
    turn = tl.arange(0, BLOCK_ROPE)[None]
    is_rope = (head < h) & (turn < D_ROPE)
    channel = tl.arange(0, BLOCK_D)[None]
    is_plain = (head < h) & (channel < D_PLAIN)
    rope = _head(row + D_PLAIN, turn, is_rope)
    if D_PLAIN > 0:
        plain = _head(row, channel, is_plain)
    if HAS_NORM:
        total = tl.sum(rope * rope, axis=1)
        if D_PLAIN > 0:
            total += tl.sum(plain * plain, axis=1)
        rstd = tl.rsqrt(total / D + norm_eps)[:, None]
        rope *= rstd
        if D_PLAIN > 0:
            plain *= rstd
    if D_PLAIN > 0:
        tl.store(out_row + channel, round_to(plain, DTYPE, INTERPRETED), mask=is_plain)
    cos = _head(cos_ptr + token * D_ROPE, turn, turn < D_ROPE)
    sin = _head(sin_ptr + token * D_ROPE, turn, turn < D_ROPE)
    rope = rotate_pairs(rope, cos, -sin if INVERSE else sin)
    tl.store(out_row + D_PLAIN + turn, round_to(rope, DTYPE, INTERPRETED), mask=is_rope)


@triton.jit(do_not_specialize=["h", "norm_eps"])
def _norm_rotate_tail_bwd_kernel(
    grad_ptr, stride_grad_t, stride_grad_h, x_ptr, stride_x_t, stride_x_h, cos_ptr, sin_ptr,
    d_x_ptr, h, norm_eps,
    D: tl.constexpr, D_ROPE: tl.constexpr, INVERSE: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):  # fmt: skip
    # y = x / rms, g = the gradient turned back:  d_x = (g - y mean(g y)) / rms
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    D_PLAIN: tl.constexpr = D - D_ROPE
    num_blocks = tl.cdiv(h, BLOCK_H)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    head = (tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    row = x_ptr + token * stride_x_t + head * stride_x_h
    grad_row = grad_ptr + token * stride_grad_t + head * stride_grad_h
    d_x_row = d_x_ptr + (token * h + head) * D
    turn = tl.arange(0, BLOCK_ROPE)[None]
    is_rope = (head < h) & (turn < D_ROPE)
    channel = tl.arange(0, BLOCK_D)[None]
    is_plain = (head < h) & (channel < D_PLAIN)
    cos = _head(cos_ptr + token * D_ROPE, turn, turn < D_ROPE)
    sin = _head(sin_ptr + token * D_ROPE, turn, turn < D_ROPE)
    g_rope = _head(grad_row + D_PLAIN, turn, is_rope)
    g_rope = rotate_pairs(g_rope, cos, sin if INVERSE else -sin)
    y_rope = _head(row + D_PLAIN, turn, is_rope)
    squares, products = tl.sum(y_rope * y_rope, axis=1), tl.sum(g_rope * y_rope, axis=1)
    if D_PLAIN > 0:
        g, y = _head(grad_row, channel, is_plain), _head(row, channel, is_plain)
        squares += tl.sum(y * y, axis=1)
        products += tl.sum(g * y, axis=1)
    rstd = tl.rsqrt(squares / D + norm_eps)[:, None]
    along = products[:, None] / D * rstd * rstd
    d_rope = (g_rope - y_rope * along) * rstd
    tl.store(d_x_row + D_PLAIN + turn, round_to(d_rope, DTYPE, INTERPRETED), mask=is_rope)
    if D_PLAIN > 0:
        d_plain = (g - y * along) * rstd
        tl.store(d_x_row + channel, round_to(d_plain, DTYPE, INTERPRETED), mask=is_plain)


def rotate_tail_triton(
    x: Tensor, rotation: Rotation, *, inverse: bool, norm_eps: float | None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `model1.ops.rope.rotate_tail` and, with norm_eps, `model1.ops.rope.norm_rotate_tail`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    heads = _heads(x)
    grid, options = _launch(heads, rotation, inverse, config or Config())
    kernel: Any = _rotate_tail_fwd_kernel
    with torch.cuda.device_of(x):
        kernel[grid](
            heads, *heads.stride()[:2], *(a.contiguous() for a in rotation), out, heads.shape[1],
            norm_eps or 0.0, HAS_NORM=norm_eps is not None, **options,
        )  # fmt: skip
    return out


def norm_rotate_tail_backward_triton(
    grad: Tensor, x: Tensor, rotation: Rotation, *, inverse: bool, norm_eps: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `model1.ops.rope.ref.norm_rotate_tail_backward_ref`."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if d_x.numel() == 0:
        return d_x
    heads, grads = _heads(x), _heads(grad)
    grid, options = _launch(heads, rotation, inverse, config or Config())
    kernel: Any = _norm_rotate_tail_bwd_kernel
    with torch.cuda.device_of(x):
        kernel[grid](
            grads, *grads.stride()[:2], heads, *heads.stride()[:2],
            *(a.contiguous() for a in rotation), d_x, heads.shape[1], norm_eps, **options,
        )  # fmt: skip
    return d_x


def _heads(x: Tensor) -> Tensor:
    """x as [t, h, d] with neighbouring channels, a copy only where they are apart."""
    x = x.unsqueeze(1) if x.dim() == 2 else x
    return x if x.stride(2) == 1 else x.contiguous()


def _launch(
    x: Tensor, rotation: Rotation, inverse: bool, config: Config
) -> tuple[tuple[int], dict[str, Any]]:
    t, h, d = x.shape
    constants = _constants(h, d, rotation.cos.shape[1], config)
    constants |= {"INVERSE": inverse, "INTERPRETED": knobs.runtime.interpret}
    grid = (t * -(-h // constants["BLOCK_H"]),)
    return grid, constants | launch_options(config.num_warps, 1)


def _constants(h: int, d: int, d_rope: int, config: Config) -> dict[str, Any]:
    block_d = triton.next_power_of_2(max(d - d_rope, d_rope))
    block_h = max(1, min(config.block_elements // block_d, triton.next_power_of_2(h)))
    blocks = {"BLOCK_H": block_h, "BLOCK_D": block_d}
    return {"D": d, "D_ROPE": d_rope, **blocks, "BLOCK_ROPE": triton.next_power_of_2(d_rope)}


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """MODEL1's queries behind their norm: 64 heads of 448 + 64 channels; V3.2's 64 turned ones."""
    config, cases = Config(), []
    for name, h, d, has_norm in (("model1", 64, 512, True), ("v32", 128, 64, False)):
        constants = _constants(h, d, 64, config) | {
            "stride_x_t": h * d, "stride_x_h": d, "stride_grad_t": h * d, "stride_grad_h": d,
            "INVERSE": False, "HAS_NORM": has_norm, "INTERPRETED": False,
        }  # fmt: skip
        signature = dict.fromkeys(("x_ptr", "out_ptr", "grad_ptr", "d_x_ptr"), "*bf16")
        signature |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "h": "i32", "norm_eps": "fp32"}
        kernels = [("forward", _rotate_tail_fwd_kernel)]
        kernels += [("backward", _norm_rotate_tail_bwd_kernel)] if has_norm else []
        for step, kernel in kernels:
            own = {x: value for x, value in constants.items() if x in kernel.arg_names}
            cases.append(
                CompileCase(
                    name=f"rotate_tail {step} {name}",
                    kernel=kernel,
                    signature=signature | dict.fromkeys(own, "constexpr"),
                    constexprs=own,
                    num_warps=config.num_warps,
                    num_stages=1,
                )
            )
    return cases
