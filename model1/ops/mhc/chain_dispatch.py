"""The fused operators as PyTorch sees them where a kernel or a plug-in runs.

A custom operator may not return what it was given, so that the stream which the collapse passes on
is handed out by an autograd function around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.mhc.dispatch import like, operator

COLLAPSE_NORM = operator("mhc_collapse_norm", "portable_chain")
COLLAPSE_NORM_BACKWARD = operator("mhc_collapse_norm_backward", "portable_chain_backward")
ENTER = operator("mhc_enter", "portable_chain")
ENTER_BACKWARD = operator("mhc_enter_backward", "portable_seam_backward")
SEAM = operator("mhc_seam", "portable_chain")
SEAM_BACKWARD = operator("mhc_seam_backward", "portable_seam_backward")


@torch.library.custom_op("model1::mhc_collapse_norm", mutates_args=())
def _collapse_norm(
    x: Tensor, pre: Tensor, weight: Tensor, norm_eps: float, backend: str
) -> Tensor:  # fmt: skip
    return COLLAPSE_NORM.load(backend)(x, pre, weight, norm_eps=norm_eps)


@torch.library.custom_op("model1::mhc_collapse_norm_backward", mutates_args=())
def _collapse_norm_backward(
    grad: Tensor,
    passed: Tensor | None,
    x: Tensor,
    pre: Tensor,
    weight: Tensor,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    passed = None if passed is None else passed.contiguous()
    run = COLLAPSE_NORM_BACKWARD.load(backend)
    return run(grad.contiguous(), passed, x, pre, weight, norm_eps=norm_eps)


@torch.library.custom_op("model1::mhc_enter", mutates_args=())
def _enter(
    x: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # u, post, comb and pre; the fifth is for the gradient of the Triton backend
    arguments, options = (x, phi, scale, bias, weight), {"eps": eps, "norm_eps": norm_eps}
    out = ENTER.load(backend)(*arguments, iters=iters, **options)
    return *out[:4], out[4] if len(out) > 4 else out[3].new_empty(0)


@torch.library.custom_op("model1::mhc_enter_backward", mutates_args=())
def _enter_backward(
    passed: Tensor | None,
    d_u: Tensor,
    d_post: Tensor,
    d_comb: Tensor,
    x: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    pre: Tensor,
    saved: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = (grad if grad is None else grad.contiguous() for grad in (passed, d_u, d_post, d_comb))
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    run = ENTER_BACKWARD.load(backend)
    return run(*grads, x, phi, scale, bias, weight, pre, saved, **options)


@torch.library.custom_op("model1::mhc_seam", mutates_args=())
def _seam(
    x: Tensor,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # new x, u, post, comb and pre; the sixth is for the gradient of the Triton backend
    arguments = x, y, post, comb, phi, scale, bias, weight
    out = SEAM.load(backend)(*arguments, iters=iters, eps=eps, norm_eps=norm_eps)
    return *out[:5], out[5] if len(out) > 5 else out[4].new_empty(0)


@torch.library.custom_op("model1::mhc_seam_backward", mutates_args=())
def _seam_backward(
    d_out: Tensor,
    d_u: Tensor,
    d_post: Tensor,
    d_comb: Tensor,
    x: Tensor,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    out: Tensor,
    pre: Tensor,
    saved: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = (grad.contiguous() for grad in (d_out, d_u, d_post, d_comb))
    inputs = x, y, post, comb, phi, scale, bias, weight
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    return SEAM_BACKWARD.load(backend)(*grads, *inputs, out, pre, saved, **options)


@_collapse_norm.register_fake
def _(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2])


@_enter.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, n, c = x.shape
    saved = (t, args[0].shape[0] + 1) if args[-1] == "triton" else (0,)
    new = (x.new_empty(shape, dtype=torch.float32) for shape in ((t, n), (t, n, n), (t, n), saved))
    post, comb, pre, rest = new
    return x.new_empty(t, c), post, comb, pre, rest


@_seam.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, n, c = x.shape
    saved = (t, args[3].shape[0] + 1) if args[-1] == "triton" else (0,)
    new = (x.new_empty(shape, dtype=torch.float32) for shape in ((t, n), (t, n, n), (t, n), saved))
    post, comb, pre, rest = new
    return x.new_empty(x.shape), x.new_empty(t, c), post, comb, pre, rest


_collapse_norm_backward.register_fake(lambda *args: like(*args[2:5]))
_enter_backward.register_fake(lambda *args: like(*args[4:9]))
_seam_backward.register_fake(lambda *args: like(*args[4:12]))


class CollapseNorm(torch.autograd.Function):
    """(x, pre, weight, norm_eps, backend) to u and x; both gradients of x leave as one."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """See `model1.ops.mhc.chain.mhc_collapse_norm`."""
        x, pre, weight, *ctx.fields = args
        ctx.set_materialize_grads(False)  # a stream that nothing reads costs nothing
        ctx.save_for_backward(x, pre, weight)
        return torch.ops.model1.mhc_collapse_norm(*args), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, pre and weight."""
        grad, passed = grads
        if grad is None:
            return passed, None, None, None, None
        run = torch.ops.model1.mhc_collapse_norm_backward
        return *run(grad, passed, *ctx.saved_tensors, *ctx.fields), None, None


class Enter(torch.autograd.Function):
    """(x, phi, scale, bias, weight, options) to x, u, post and comb; x's gradients leave as one."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `model1.ops.mhc.chain.mhc_enter`."""
        x, *_ = args
        u, post, comb, *kept = torch.ops.model1.mhc_enter(*args)
        ctx.fields = args[5:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:5], *kept)
        return x.view_as(x), u, post, comb

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the five tensors."""
        passed, *rest = grads
        if all(grad is None for grad in rest):
            return passed, *(None,) * 8
        x, *_, pre, _ = ctx.saved_tensors
        t, n, c = x.shape
        likes = (x, (t, c)), (pre, (t, n)), (pre, (t, n, n))
        filled = (
            other.new_zeros(shape) if grad is None else grad
            for grad, (other, shape) in zip(rest, likes, strict=True)
        )
        run = torch.ops.model1.mhc_enter_backward
        return *run(passed, *filled, *ctx.saved_tensors, *ctx.fields), *(None,) * 4


def _save_collapse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pre, weight, *ctx.fields = inputs
    ctx.save_for_backward(x, pre, weight)


def _back_through_collapse(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    run = torch.ops.model1.mhc_collapse_norm_backward
    return *run(grad, None, *ctx.saved_tensors, *ctx.fields), None, None


def _save_seam(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.fields = inputs[8:]
    ctx.mark_non_differentiable(*output[4:])
    # the new streams too, which the next write-back keeps anyway
    ctx.save_for_backward(*inputs[:8], output[0], *output[4:])


def _back_through_seam(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    run = torch.ops.model1.mhc_seam_backward
    return *run(*grads[:4], *ctx.saved_tensors, *ctx.fields), None, None, None, None


_collapse_norm.register_autograd(_back_through_collapse, setup_context=_save_collapse)
_seam.register_autograd(_back_through_seam, setup_context=_save_seam)


def _save_enter(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.fields = inputs[5:]
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[:5], *output[3:])


def _back_through_enter(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    run = torch.ops.model1.mhc_enter_backward
    return *run(None, *grads[:3], *ctx.saved_tensors, *ctx.fields), *(None,) * 4


_enter.register_autograd(_back_through_enter, setup_context=_save_enter)
