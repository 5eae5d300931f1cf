"""Root-mean-square normalisation, alone or behind the addition of a residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import KERNEL_DTYPES, Operator, calls_ref_directly, unless_fused
from model1.ops.norm.ref import normalise

MAX_KERNEL_CHANNELS = 16384  # a row lies in registers


def _operator(name: str, module: str) -> Operator:
    return Operator(
        name=name,
        implementations={
            "ref": f"model1.ops.norm.ref:{name}_ref",
            "triton": f"model1.ops.norm.{module}:{name}_triton",
        },
    )


RMS_NORM = _operator("rms_norm", "portable")
RMS_NORM_BACKWARD = _operator("rms_norm_backward", "portable_backward")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x**2, last axis) + eps) * weight, in the dtype of x; weight None means 1.

    x: [..., c] floating point, 16 bits computed in fp32 and rounded once; leading axes may be
    empty. weight: [c] of any floating dtype, rounded to that of x first. A NaN makes its row NaN,
    an infinity itself NaN and the rest of its row 0. Differentiable, with kernels once; the
    weight's gradient is added up in a fixed order. Kernels take bf16, fp16 and fp32 and up to
    16384 channels, wherever the rows lie; "auto" is the reference for others and under
    torch.compile, which fuses it. Raises ValueError for shapes, dtypes and devices (on a CPU not
    where no gradient is recorded), BackendUnavailable for a backend that cannot run here.
    Source: arXiv 1910.07467.
    """
    name = RMS_NORM.resolve(_usable(backend, x), x.device)
    if calls_ref_directly(name):
        return normalise(x, weight, eps)
    _check(x, None, weight, name)
    if name == "ref":
        return normalise(x, weight, eps)
    return torch.ops.model1.rms_norm(x, None, weight, eps, name)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum, both in the dtype of x and in one pass.

    x, residual: [..., c], the same shape and dtype; the sum is rounded to it before its mean is
    taken, as by two steps. Backends, errors and the rest as in `rms_norm`.
    """
    name = RMS_NORM.resolve(_usable(backend, x), x.device)
    if not calls_ref_directly(name):
        _check(x, residual, weight, name)
    if name == "ref":
        total = x + residual
        return normalise(total, weight, eps), total
    return torch.ops.model1.rms_norm(x, residual, weight, eps, name)


def _usable(backend: str, x: Tensor) -> str:
    if backend == "auto" and x.is_cuda and x.shape[-1] > MAX_KERNEL_CHANNELS:
        return "ref"
    return unless_fused(backend, x)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, backend: str) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be [..., c] floating point, got {list(x.shape)} {x.dtype}")
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            rule, got = f"{list(x.shape)} {x.dtype}", f"{list(residual.shape)} {residual.dtype}"
            raise ValueError(f"residual must be {rule} like x, got {got}")
        _check_device("residual", residual, x)
    if weight is not None:
        if weight.shape != x.shape[-1:] or not weight.is_floating_point():
            got = f"{list(weight.shape)} {weight.dtype}"
            raise ValueError(f"weight must be [{x.shape[-1]}] floating point, got {got}")
        _check_device("weight", weight, x)
    if backend != "triton":
        return
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"x must be bfloat16, float16 or float32 for triton, got {x.dtype}")
    if x.shape[-1] > MAX_KERNEL_CHANNELS:
        raise ValueError(
            f"x must have at most {MAX_KERNEL_CHANNELS} channels for triton, got {x.shape[-1]}"
        )


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


@torch.library.custom_op("model1::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    out, total = RMS_NORM.load(backend)(x, residual, weight, eps)
    return out, total if residual is not None else x.new_empty(0)


@torch.library.custom_op("model1::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor | None, eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return RMS_NORM_BACKWARD.load(backend)(grad, d_total, total, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, residual: Tensor | None, *args: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape)


@_rms_norm_backward.register_fake
def _(
    grad: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor | None, *args: object
) -> tuple[Tensor, Tensor]:
    d_weight = total.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return total.new_empty(total.shape), d_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps, ctx.backend = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    grad = torch.zeros_like(total) if grad is None else grad
    run = torch.ops.model1.rms_norm_backward
    d_total = d_total if ctx.has_residual else None
    d_x, d_weight = run(grad, d_total, total, weight, ctx.eps, ctx.backend)
    d_residual = d_x if ctx.has_residual else None
    return d_x, d_residual, None if weight is None else d_weight, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)
