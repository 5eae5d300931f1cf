"""Engram's short convolution over packed documents, without a window in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.engram.checks import check_eps, check_for_kernel, check_int64, check_shape
from model1.ops.engram.ref import engram_causal_conv_ref


def _operator(name: str) -> Operator:
    return Operator(
        name=name,
        implementations={
            "ref": f"model1.ops.engram.ref:{name}_ref",
            "triton": f"model1.ops.engram.portable_conv:{name}_triton",
        },
    )


ENGRAM_CAUSAL_CONV = _operator("engram_causal_conv")
ENGRAM_CAUSAL_CONV_BACKWARD = _operator("engram_causal_conv_backward")


def engram_causal_conv(
    x: Tensor,
    positions: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    *,
    dilation: int,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """`engram_short_conv` of tokens that lie one after the other: [t, n*d] in x's dtype.

    out[t, c] = silu(sum_j weight[c, j] * RMSNorm(x[t - dilation * (K - 1 - j)])[c])

    x: [t, n*d] of packed documents. positions: [t] int64, where each token stands in its document,
    at most its row; taps before the document's start are zeros. weight: [n*d, K], the last tap is
    the token itself. norm_weight: [n, d]; the norm is per stream. A token's result does not depend
    on how the sequence was cut. Differentiable in x and both weights, with kernels once; weight
    gradients are added up in a fixed order. Kernels compute in fp32: with an fp64 x, "auto" is the
    reference. A NaN reaches the tokens that see it.
    Raises ValueError for shapes and dtypes, BackendUnavailable for a backend that cannot run here.
    Source: arXiv 2601.07372, section 2.3.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be [t, n*d] floating point, got {tuple(x.shape)} {x.dtype}")
    if norm_weight.ndim != 2 or norm_weight.numel() != x.shape[1]:
        rule = f"[n, d] with n*d = {x.shape[1]}"
        raise ValueError(f"norm_weight must be {rule}, got shape {tuple(norm_weight.shape)}")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise ValueError(f"weight must be [{x.shape[1]}, K > 0], got shape {tuple(weight.shape)}")
    check_int64("positions", positions, 1)
    check_shape("positions", positions, (x.shape[0],))
    check_eps(eps)
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    is_wide = x.dtype == torch.float64
    name = ENGRAM_CAUSAL_CONV.resolve("ref" if is_wide and backend == "auto" else backend, x.device)
    if name == "ref":  # PyTorch differentiates and traces it, fp64 and twice included
        return engram_causal_conv_ref(x, positions, weight, norm_weight, dilation, eps)
    if is_wide:
        raise ValueError(f"x must be bfloat16, float16 or float32 for {name}, got {x.dtype}")
    check_for_kernel(x.device, is_floating=True, weight=weight, norm_weight=norm_weight)
    check_for_kernel(x.device, is_floating=False, positions=positions)
    run = torch.ops.model1.engram_causal_conv
    return run(x, positions, weight, norm_weight, dilation, eps, name)


@torch.library.custom_op("model1::engram_causal_conv", mutates_args=())
def _engram_causal_conv(
    x: Tensor, positions: Tensor, weight: Tensor, norm_weight: Tensor, dilation: int, eps: float,
    backend: str,
) -> Tensor:  # fmt: skip
    run = ENGRAM_CAUSAL_CONV.load(backend)
    return run(x, positions, weight, norm_weight, dilation, eps)


@torch.library.custom_op("model1::engram_causal_conv_backward", mutates_args=())
def _engram_causal_conv_backward(
    grad: Tensor, x: Tensor, positions: Tensor, weight: Tensor, norm_weight: Tensor,
    dilation: int, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    run = ENGRAM_CAUSAL_CONV_BACKWARD.load(backend)
    return run(grad, x, positions, weight, norm_weight, dilation, eps)


_engram_causal_conv.register_fake(lambda x, *args: x.new_empty(x.shape))


@_engram_causal_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, positions: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(y.new_empty(y.shape) for y in (x, *args[:2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dilation, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_x, d_weight, d_norm_weight = torch.ops.model1.engram_causal_conv_backward(
        grad, *ctx.saved_tensors, ctx.dilation, ctx.eps, ctx.backend
    )
    return d_x, None, d_weight, d_norm_weight, None, None, None


_engram_causal_conv.register_autograd(_backward, setup_context=_setup_context)
