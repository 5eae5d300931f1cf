"""The gradient of sparse prefill: an operator of its own, and its place in autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.sparse_prefill.choice import hopper_backward_wins, hopper_call_refusal

SPARSE_PREFILL_BACKWARD = Operator(
    name="sparse_prefill_backward",
    implementations={
        "ref": "model1.ops.sparse_prefill.ref:sparse_prefill_backward_ref",
        "triton": "model1.ops.sparse_prefill.portable_backward:sparse_prefill_backward_triton",
        "hopper": "model1.ops.sparse_prefill.hopper_backward:sparse_prefill_backward_hopper",
    },
)


@torch.library.custom_op("model1::sparse_prefill_backward", mutates_args=())
def _sparse_prefill_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return SPARSE_PREFILL_BACKWARD.load(backend)(
        dout, q, kv, topk_indices, topk_length=topk_length, attn_sink=attn_sink, out=out, lse=lse,
        softmax_scale=softmax_scale, deterministic=deterministic,
    )  # fmt: skip


@_sparse_prefill_backward.register_fake
def _(dout: Tensor, q: Tensor, kv: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    attn_sink = args[2]
    num_sinks = 0 if attn_sink is None else q.shape[1]
    dsink = q.new_empty(num_sinks, dtype=torch.float32)
    return q.new_empty(q.shape), kv.new_empty(kv.shape), dsink


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What `sparse_prefill` keeps for its gradient, which passes through out alone."""
    *tensors, _value_dim, softmax_scale, _empty_lse, deterministic, _backend, asked = inputs
    out, max_logits, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.options = (softmax_scale, deterministic, asked)
    ctx.mark_non_differentiable(max_logits, lse)


def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `sparse_prefill`, in their order."""
    softmax_scale, deterministic, asked = ctx.options
    q, out = ctx.saved_tensors[0], ctx.saved_tensors[5]
    name = SPARSE_PREFILL_BACKWARD.resolve_call(
        asked, dout.device,
        hopper_call_refusal(q.dtype, q.shape[2], out.shape[2], softmax_scale),
        hopper_backward_wins(q.shape[1], deterministic),
    )  # fmt: skip
    dq, dkv, dsink = torch.ops.model1.sparse_prefill_backward(
        dout, *ctx.saved_tensors, softmax_scale, deterministic, name
    )
    has_sink = ctx.saved_tensors[4] is not None
    return dq, dkv, None, None, dsink if has_sink else None, *[None] * 6
