"""Triton kernel for the gradient of a seam: see `model1.ops.mhc.chain`.

The gradient of the new streams is needed by everything before them and is never stored: a warp
makes it for a token, some channels at a time, from what comes from later, from the collapse and
from the coefficients, and takes the write-back's gradients from its registers. The collapse's sums
over all channels must be known before, see `portable_chain_backward`. The coefficients' part is a
matrix of rank n*n + 2n, which PyTorch multiplies out: made here, it came in the matrix unit's
layout, in which everything else was slower than reading it costs (docs/log.md, 2026-12-01).
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# pyright: reportAssignmentType=none, reportOperatorIssue=none, reportAttributeAccessIssue=none
# pyright: reportArgumentType=none

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options
from model1.ops.mhc.portable import (
    SHIPPED,
    compile_case,
    with_adjacent_channels,
)
from model1.ops.mhc.portable_backward import product_gradient, stream_gradient
from model1.ops.mhc.portable_chain_backward import (
    PIECE,
    collapse_gradient,
    mhc_collapse_norm_backward_triton,
)
from model1.ops.mhc.portable_phi import phi_gradient
from model1.ops.mhc.portable_streams import (
    LOAD_BYTES,
    add_products,
    mhc_write_back_backward_triton,
    numbers,
    tiles,
    weighted_sum,
)
from model1.ops.rounding import round_to

FUSED_STREAMS = 4  # more have too many sums for a thread's registers


@triton.jit
def _seam_bwd_kernel(
    d_u_ptr, passed_ptr, out_ptr, through_ptr, x_ptr, stride_x_t, stride_x_n, y_ptr, weight_ptr,
    pre_ptr, post_ptr, comb_ptr, stats_ptr, spread_ptr,
    d_x_ptr, d_y_ptr, d_post_ptr, d_comb_ptr,
    N: tl.constexpr, C: tl.constexpr, INTERPRETED: tl.constexpr,
    HAS_THROUGH: tl.constexpr, WRITES_BACK: tl.constexpr, BLOCK_C: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    # stats [t, 2] of the collapse; through [t, N, C]: what comes through the products of phi;
    # spread [t]: what the streams are multiplied by for their root mean square
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    rstd = tl.load(stats_ptr + 2 * token)
    drop = tl.load(stats_ptr + 2 * token + 1) * rstd * rstd
    pre = numbers(pre_ptr + token * N, 0, 1, N)
    if HAS_THROUGH:
        spread = tl.load(spread_ptr + token)
    sums = ()  # d_post, then d_comb row by row
    if WRITES_BACK:
        post = numbers(post_ptr + token * N, 0, 1, N)
        for _ in tl.static_range(N + N * N):
            sums += (tl.zeros((BLOCK_C // RUN,), tl.float32),)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = channel < C
        # all loads first: none may pass a store
        out = tiles(out_ptr + token * (N * C), C, channel, inside, N)
        passed = tiles(passed_ptr + token * (N * C), C, channel, inside, N)
        if HAS_THROUGH:
            through = tiles(through_ptr + token * (N * C), C, channel, inside, N)
        d_u = tl.load(d_u_ptr + token * C + channel, mask=inside, other=0.0).to(tl.float32)
        if WRITES_BACK:
            y = tl.load(y_ptr + token * C + channel, mask=inside, other=0.0).to(tl.float32)
            x = tiles(x_ptr + token * stride_x_t, stride_x_n, channel, inside, N)
        weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        d_collapsed = d_u * weight * rstd - drop * weighted_sum(out, pre, N)
        total = ()
        for k in tl.static_range(N):
            value = passed[k].to(tl.float32) + d_collapsed * pre[k]
            if HAS_THROUGH:
                value += through[k].to(tl.float32) + spread * out[k].to(tl.float32)
            total += (value,)
        if WRITES_BACK:
            d_y = round_to(weighted_sum(total, post, N), d_y_ptr.dtype.element_ty, INTERPRETED)
            tl.store(d_y_ptr + token * C + channel, d_y, mask=inside)
            new = add_products(sums[:N], y, total, RUN, N)
            for j in tl.static_range(N):
                wide = x[j].to(tl.float32)
                new += add_products(sums[N + j * N : 2 * N + j * N], wide, total, RUN, N)
                weights = numbers(comb_ptr + token * (N * N), j * N, 1, N)
                d_x = round_to(weighted_sum(total, weights, N), DTYPE, INTERPRETED)
                tl.store(d_x_ptr + (token * N + j) * C + channel, d_x, mask=inside)
            sums = new
        else:
            for k in tl.static_range(N):
                d_x = round_to(total[k], DTYPE, INTERPRETED)
                tl.store(d_x_ptr + (token * N + k) * C + channel, d_x, mask=inside)
    if WRITES_BACK:
        for k in tl.static_range(N):
            tl.store(d_post_ptr + token * N + k, tl.sum(sums[k], axis=0))
        for i in tl.static_range(N * N):
            tl.store(d_comb_ptr + token * (N * N) + i, tl.sum(sums[N + i], axis=0))


def is_fused(x: Tensor) -> bool:
    """Whether the kernel takes such streams; else the operators' gradients run one by one."""
    return x.dtype == torch.bfloat16 and x.shape[1] <= FUSED_STREAMS


class SeamGradients(NamedTuple):
    """What the gradient of the new streams is made of."""

    d_u: Tensor  # [t, c]
    passed: Tensor  # [t, n, c], from later
    stats: Tensor  # [t, 2] of `collapse_gradient`
    through: Tensor | None = None  # [t, n * c], through phi's products
    spread: Tensor | None = None  # [t], of their root mean square, with it


def mhc_enter_backward_triton(
    passed: Tensor | None, d_u: Tensor, d_post: Tensor, d_comb: Tensor,
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, pre: Tensor,
    saved: Tensor, *, iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Those of `mhc_enter_backward_ref`, from contiguous gradients."""
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    if not is_fused(x):
        return _enter_in_parts(
            passed, (d_u, d_post, d_comb), x, phi, scale, bias, weight, pre, saved, **options
        )
    x = x.contiguous()
    given = torch.zeros_like(x) if passed is None else passed
    grads, *parameters = _through_coefficients(
        (given, d_u, d_post, d_comb), x, phi, scale, bias, weight, pre, saved, **options
    )
    d_x = torch.empty_like(x)
    if len(x) > 0:
        _launch(grads, x, pre, weight, (x, x, pre, pre), (d_x, d_x, pre, pre), writes_back=False)
    return d_x, *parameters


def mhc_seam_backward_triton(
    d_out: Tensor, d_u: Tensor, d_post: Tensor, d_comb: Tensor,
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor, scale: Tensor, bias: Tensor,
    weight: Tensor, out: Tensor, pre: Tensor, saved: Tensor, *,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Those of `mhc_seam_backward_ref`, from contiguous gradients."""
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    parameters = out, phi, scale, bias, weight, pre, saved
    if not is_fused(out):
        total, *rest = _enter_in_parts(d_out, (d_u, d_post, d_comb), *parameters, **options)
        return *mhc_write_back_backward_triton(total, x, y, post, comb), *rest
    grads, *rest = _through_coefficients((d_out, d_u, d_post, d_comb), *parameters, **options)
    return *write_back_gradient(grads, x, y, post, comb, weight, out, pre), *rest


def _through_coefficients(
    grads: tuple[Tensor, ...], out: Tensor, phi: Tensor, scale: Tensor, bias: Tensor,
    weight: Tensor, pre: Tensor, saved: Tensor, *, iters: int, eps: float, norm_eps: float,
) -> tuple[SeamGradients, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the streams' gradient is made of, then those of phi, scale, bias and the norm."""
    passed, d_u, d_post, d_comb = grads
    d_pre, stats, d_weight = collapse_gradient(d_u, out, pre, weight, norm_eps=norm_eps)
    grads = d_pre, d_post, d_comb
    product = product_gradient(grads, out, scale, bias, saved, iters=iters, eps=eps)
    d_phi = phi_gradient(out, phi, product.full)
    # both factors and the product rounded on the way, as the result's own
    through = product.short @ phi.to(out.dtype)
    whole = SeamGradients(d_u, passed, stats, through, product.spread)
    return whole, d_phi, product.d_scale, product.d_bias, d_weight


def _enter_in_parts(
    passed: Tensor | None, grads: tuple[Tensor, Tensor, Tensor], out: Tensor, phi: Tensor,
    scale: Tensor, bias: Tensor, weight: Tensor, pre: Tensor, saved: Tensor, *,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the streams, phi, scale, bias and the norm, one operator after the other."""
    d_u, d_post, d_comb = grads
    total, d_pre, d_weight = mhc_collapse_norm_backward_triton(
        d_u, passed, out, pre, weight, norm_eps=norm_eps
    )
    grads = d_pre, d_post, d_comb
    product = product_gradient(grads, out, scale, bias, saved, iters=iters, eps=eps)
    total, d_phi = stream_gradient(out, phi, product.full, product.spread, passed=total)
    return total, d_phi, product.d_scale, product.d_bias, d_weight


def write_back_gradient(
    grads: SeamGradients, x: Tensor, y: Tensor, post: Tensor, comb: Tensor, weight: Tensor,
    out: Tensor, pre: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, y, post and comb."""
    t, n, c = out.shape
    d_x = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    d_y = torch.empty(t, c, dtype=y.dtype, device=x.device)
    d_post = torch.empty(t, n, dtype=torch.float32, device=x.device)
    d_comb = torch.empty(t, n, n, dtype=torch.float32, device=x.device)
    if t > 0:
        inputs = with_adjacent_channels(x), y.contiguous(), post.contiguous(), comb.contiguous()
        _launch(grads, out, pre, weight, inputs, (d_x, d_y, d_post, d_comb), writes_back=True)
    return d_x, d_y, d_post.to(post.dtype), d_comb.to(comb.dtype)


def _launch(
    grads: SeamGradients, out: Tensor, pre: Tensor, weight: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], results: tuple[Tensor, Tensor, Tensor, Tensor],
    *, writes_back: bool,
) -> None:  # fmt: skip
    """inputs: x, y, post and comb; results: their gradients, of which the first is enough."""
    t, n, c = out.shape
    x, y, post, comb = inputs
    has_through = grads.through is not None
    kernel: Any = _seam_bwd_kernel
    with torch.cuda.device_of(x):
        kernel[(t,)](
            grads.d_u, grads.passed, out, grads.through if has_through else out,
            x, x.stride(0), x.stride(1), y, weight.contiguous(), pre.contiguous(), post, comb,
            grads.stats, grads.spread if has_through else grads.stats, *results,
            INTERPRETED=knobs.runtime.interpret, HAS_THROUGH=has_through, WRITES_BACK=writes_back,
            **seam_constants(n, c, x.element_size()), **launch_options(1, 1),
        )  # fmt: skip


def seam_constants(n: int, c: int, element_bytes: int) -> dict[str, Any]:
    """Sizes of the seam's gradient."""
    block_c = max(32, min(PIECE, triton.next_power_of_2(c)))
    return {"N": n, "C": c, "BLOCK_C": block_c, "RUN": LOAD_BYTES // element_bytes}


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """The gradients of four streams of 4096 channels."""
    cases = []
    for name, has_through, writes_back in (
        ("seam backward", True, True),
        ("enter backward", True, False),
        ("single pass backward", False, True),
    ):
        flags = {"INTERPRETED": False, "HAS_THROUGH": has_through, "WRITES_BACK": writes_back}
        constants = seam_constants(*SHIPPED, 2) | flags
        cases.append(compile_case(name, _seam_bwd_kernel, constants, 1))
    return cases
