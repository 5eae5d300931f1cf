"""The exit's weights as PyTorch sees them where a kernel or a plug-in runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.mhc.dispatch import like, operator

HEAD = operator("mhc_head", "portable_head")
HEAD_BACKWARD = operator("mhc_head_backward", "portable_head")


@torch.library.custom_op("model1::mhc_head", mutates_args=())
def _head(
    x: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: float,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # the second is for the gradient of the Triton backend; others return the weights alone
    got = HEAD.load(backend)(x, phi, scale, bias, eps=eps, norm_eps=norm_eps)
    return (got, got.new_empty(0)) if isinstance(got, Tensor) else got


@torch.library.custom_op("model1::mhc_head_backward", mutates_args=())
def _head_backward(
    d_pre: Tensor,
    x: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    saved: Tensor,
    eps: float,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run, options = HEAD_BACKWARD.load(backend), {"eps": eps, "norm_eps": norm_eps}
    return run(d_pre.contiguous(), x, phi, scale, bias, saved, **options)


@_head.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    t, n, _ = x.shape
    saved = (t, n + 1) if args[-1] == "triton" else (0,)
    return x.new_empty(t, n, dtype=torch.float32), x.new_empty(saved, dtype=torch.float32)


_head_backward.register_fake(lambda d_pre, *args: like(*args[:4]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, phi, scale, bias, *ctx.fields = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, phi, scale, bias, output[1])


def _back(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    run = torch.ops.model1.mhc_head_backward
    return *run(grads[0], *ctx.saved_tensors, *ctx.fields), None, None, None


_head.register_autograd(_back, setup_context=_save)
