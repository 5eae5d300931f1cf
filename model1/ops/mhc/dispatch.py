"""The hyper-connection operators as PyTorch sees them where a kernel or a plug-in runs.

The reference is not called through these: PyTorch differentiates and traces it by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator


def operator(name: str, triton_module: str) -> Operator:
    """An operator with a reference and with kernels in a module of this folder."""
    return Operator(
        name=name,
        implementations={
            "ref": f"model1.ops.mhc.ref:{name}_ref",
            "triton": f"model1.ops.mhc.{triton_module}:{name}_triton",
        },
    )


COEFFICIENTS = operator("mhc_coefficients", "portable")
COEFFICIENTS_BACKWARD = operator("mhc_coefficients_backward", "portable_backward")
COLLAPSE = operator("mhc_collapse", "portable_streams")
COLLAPSE_BACKWARD = operator("mhc_collapse_backward", "portable_streams")
WRITE_BACK = operator("mhc_write_back", "portable_streams")
WRITE_BACK_BACKWARD = operator("mhc_write_back_backward", "portable_streams")


@torch.library.custom_op("model1::mhc_coefficients", mutates_args=())
def _coefficients(
    x: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # the fourth is for the gradient of the Triton backend; others return three
    run = COEFFICIENTS.load(backend)
    pre, post, comb, *saved = run(x, phi, scale, bias, iters=iters, eps=eps, norm_eps=norm_eps)
    return pre, post, comb, saved[0] if saved else pre.new_empty(0)


@torch.library.custom_op("model1::mhc_coefficients_backward", mutates_args=())
def _coefficients_backward(
    d_pre: Tensor,
    d_post: Tensor,
    d_comb: Tensor,
    x: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    saved: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (grad.contiguous() for grad in (d_pre, d_post, d_comb))
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    return COEFFICIENTS_BACKWARD.load(backend)(*grads, x, phi, scale, bias, saved, **options)


@torch.library.custom_op("model1::mhc_collapse", mutates_args=())
def _collapse(x: Tensor, pre: Tensor, backend: str) -> Tensor:
    return COLLAPSE.load(backend)(x, pre)


@torch.library.custom_op("model1::mhc_collapse_backward", mutates_args=())
def _collapse_backward(
    grad: Tensor, x: Tensor, pre: Tensor, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return COLLAPSE_BACKWARD.load(backend)(grad.contiguous(), x, pre)


@torch.library.custom_op("model1::mhc_write_back", mutates_args=())
def _write_back(x: Tensor, y: Tensor, post: Tensor, comb: Tensor, backend: str) -> Tensor:
    return WRITE_BACK.load(backend)(x, y, post, comb)


@torch.library.custom_op("model1::mhc_write_back_backward", mutates_args=())
def _write_back_backward(
    grad: Tensor, x: Tensor, y: Tensor, post: Tensor, comb: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return WRITE_BACK_BACKWARD.load(backend)(grad.contiguous(), x, y, post, comb)


@_coefficients.register_fake
def _(x: Tensor, phi: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, n, _ = x.shape
    shapes = (t, n), (t, n), (t, n, n), (t, phi.shape[0] + 1) if args[-1] == "triton" else (0,)
    pre, post, comb, saved = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return pre, post, comb, saved


@_collapse.register_fake
def _(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2])


@_write_back.register_fake
def _(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape)


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Fake gradients of tensors."""
    return tuple(x.new_empty(x.shape) for x in tensors)


_coefficients_backward.register_fake(lambda *args: like(*args[3:7]))
_collapse_backward.register_fake(lambda grad, *args: like(*args[:2]))
_write_back_backward.register_fake(lambda grad, *args: like(*args[:4]))


def _save_coefficients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, phi, scale, bias, *ctx.fields = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(x, phi, scale, bias, output[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _back_through_coefficients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    run = torch.ops.model1.mhc_coefficients_backward
    return *run(*grads[:3], *ctx.saved_tensors, *ctx.fields), None, None, None, None


def _back_through_collapse(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    run = torch.ops.model1.mhc_collapse_backward
    return *run(grad, *ctx.saved_tensors, ctx.backend), None


def _back_through_write_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    run = torch.ops.model1.mhc_write_back_backward
    return *run(grad, *ctx.saved_tensors, ctx.backend), None


_coefficients.register_autograd(_back_through_coefficients, setup_context=_save_coefficients)
_collapse.register_autograd(_back_through_collapse, setup_context=_save)
_write_back.register_autograd(_back_through_write_back, setup_context=_save)
