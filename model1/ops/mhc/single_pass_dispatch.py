"""The single-pass operator as PyTorch sees it where a kernel or a plug-in runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.mhc.dispatch import like, operator

SINGLE_PASS = operator("mhc_write_back_collapse_norm", "portable_single_pass")
SINGLE_PASS_BACKWARD = operator("mhc_write_back_collapse_norm_backward", "portable_single_pass")


@torch.library.custom_op("model1::mhc_write_back_collapse_norm", mutates_args=())
def _single_pass(
    x: Tensor,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
    pre: Tensor,
    weight: Tensor,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return SINGLE_PASS.load(backend)(x, y, post, comb, pre, weight, norm_eps=norm_eps)


@torch.library.custom_op("model1::mhc_write_back_collapse_norm_backward", mutates_args=())
def _single_pass_backward(
    grad: Tensor,
    passed: Tensor | None,
    x: Tensor,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
    pre: Tensor,
    weight: Tensor,
    out: Tensor,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    passed = None if passed is None else passed.contiguous()
    run = SINGLE_PASS_BACKWARD.load(backend)
    return run(grad.contiguous(), passed, x, y, post, comb, pre, weight, out, norm_eps=norm_eps)


@_single_pass.register_fake
def _(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], x.shape[2]), x.new_empty(x.shape)


_single_pass_backward.register_fake(lambda *args: like(*args[2:8]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.norm_eps, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # streams that nothing reads may have no gradient
    # the new streams too, which what reads them keeps anyway
    ctx.save_for_backward(*tensors, output[1])


def _back(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
    x = ctx.saved_tensors[0]
    if grad is None:
        grad = x.new_zeros(x.shape[0], x.shape[2])
    run = torch.ops.model1.mhc_write_back_collapse_norm_backward
    return *run(grad, passed, *ctx.saved_tensors, ctx.norm_eps, ctx.backend), None, None


_single_pass.register_autograd(_back, setup_context=_save)
