"""Cross-entropy of a linear map whose logits exist for a chunk of tokens at a time.

    loss = sum_i -log softmax(hidden_i W^T)[targets_i]

The forward pass leaves the gradients of a loss of weight 1, so that each chunk of logits is made
once; the backward pass multiplies them by the gradient that arrives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.cross_entropy.checks import check_dtypes, check_inputs, usable

LINEAR_CROSS_ENTROPY = Operator(
    name="linear_cross_entropy",
    implementations={
        "ref": "model1.ops.cross_entropy.ref:linear_cross_entropy_ref",
        "triton": "model1.ops.cross_entropy.portable:linear_cross_entropy_triton",
    },
)


def has_kernel(hidden: Tensor) -> bool:
    """Whether "auto" means anything else than the reference for such hidden states."""
    return LINEAR_CROSS_ENTROPY.resolve(usable("auto", hidden), hidden.device) != "ref"


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int, backend: str = "auto"
) -> Tensor:
    """sum_i -log softmax(hidden_i W^T)[targets_i] over the targets that are not -100, fp32 [].

    hidden [n, c] bf16, fp16 or fp32; weight [vocab, c], fp32 or the dtype of hidden, of any vocab;
    targets [n] int64. Products take the dtype of hidden, under torch.autocast too, logits and
    their gradient are rounded to it; softmax and the sum of weight's gradient are fp32. "ref" also
    takes fp64 and computes in it.

    Memory beside the results is chunk_tokens x vocab logits and, where weight is not in hidden's
    dtype, a copy of it; where weight needs a gradient, that is kept in fp32 until backward.
    Gradients are the same bits every time, and in the dtypes of hidden and weight; differentiable
    once. Where no gradient is recorded, none is computed.

    A row whose logits hold NaN or +inf, or nothing but -inf, gives NaN; other -inf are fine. A
    target of -100 gives 0 and no gradient, whatever its logits are; its hidden state must be
    finite all the same, or weight's gradient is not. n = 0 gives 0. A target outside [0, vocab) is
    a ValueError on a CPU, outside torch.compile; elsewhere, where looking would wait for the
    device, its loss and gradients are NaN. Other ValueErrors are for shapes, dtypes, devices and
    chunk_tokens; BackendUnavailable for a backend that cannot run here.
    """
    check_inputs(hidden, weight, targets, chunk_tokens)
    name = LINEAR_CROSS_ENTROPY.resolve(usable(backend, hidden), hidden.device)
    check_dtypes(name, hidden, weight)
    is_recorded = torch.is_grad_enabled()
    needs = is_recorded and hidden.requires_grad, is_recorded and weight.requires_grad
    run = torch.ops.model1.linear_cross_entropy
    return run(hidden, weight, targets, chunk_tokens, *needs, name)[0]


@torch.library.custom_op("model1::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    needs_hidden: bool,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = LINEAR_CROSS_ENTROPY.load(backend)
    needs = {"needs_hidden": needs_hidden, "needs_weight": needs_weight}
    with torch.autocast(hidden.device.type, enabled=False):
        return run(hidden, weight, targets, chunk_tokens=chunk_tokens, **needs)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int,
    needs_hidden: bool, needs_weight: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty((), dtype=wide)
    d_hidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    d_weight = hidden.new_empty(weight.shape if needs_weight else (0,), dtype=wide)
    return loss, d_hidden, d_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.weight_dtype = inputs[4:6], inputs[1].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs
    first = _scaled(d_hidden, grad, d_hidden.dtype) if needs_hidden else None
    second = _scaled(d_weight, grad, ctx.weight_dtype) if needs_weight else None
    return first, second, None, None, None, None, None


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor, rounded once: a factor without axes would first be rounded to the dtype of x."""
    return torch.mul(x, factor.reshape(1, 1), out=torch.empty_like(x, dtype=dtype))


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
