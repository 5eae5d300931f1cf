"""Sparse prefill: each query attends to its own list of rows of one unpaged key-value matrix.

The operator of the public `flash_mla_sparse_fwd`, without its restrictions and with a backward:
any number of heads, any list length, bf16, fp16 and fp32. A row serves as key and, in its first
channels, as value.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.sparse_prefill.checks import check_lists, check_queries_and_keys, check_sink
from model1.ops.sparse_prefill.choice import hopper_call_refusal, hopper_wins
from model1.ops.sparse_prefill.gradient import backward, setup_context

SPARSE_PREFILL = Operator(
    name="sparse_prefill",
    implementations={
        "ref": "model1.ops.sparse_prefill.ref:sparse_prefill_ref",
        "triton": "model1.ops.sparse_prefill.portable:sparse_prefill_triton",
        "hopper": "model1.ops.sparse_prefill.hopper:sparse_prefill_hopper",
    },
)


class SparsePrefillResult(NamedTuple):
    """out [t, h, value_dim]; max_logits and lse [t, h]."""

    out: Tensor
    max_logits: Tensor
    lse: Tensor


def sparse_prefill(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    value_dim: int,
    softmax_scale: float,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    empty_lse: float = -math.inf,
    deterministic: bool = False,
    backend: str = "auto",
) -> SparsePrefillResult:
    """Attention of every query over the rows of kv that its row of `topk_indices` names.

    out[i, h] = sum_j e^(p_j) kv[j, :value_dim] / (sum_j e^(p_j) + e^(attn_sink[h]))
    lse[i, h] = ln sum_j e^(p_j),  max_logits[i, h] = max_j p_j,  p_j = softmax_scale q . kv[j]

    j runs over the entries k of row i with 0 <= topk_indices[i, k] < s and k < topk_length[i]; all
    others, of whatever value, are ignored, and an index that occurs twice counts twice.

    q: [t, h, d] bf16, fp16 or fp32 (fp64 with backend="ref"), any strides with a contiguous last
    axis, d a multiple of 16, t also 0. kv: [s, d] like q, any row stride (a multiple of 16 bytes
    is fastest); rows that no valid entry names may be NaN. topk_indices: [t, topk] int32, topk may
    be 0. topk_length: [t] int32; None = all. attn_sink: [h] fp32 natural-log logit, +-inf allowed,
    part of out only.

    Returns out in q's dtype and max_logits and lse in fp32 (fp64 for fp64). A query without a
    valid entry gives out = 0, max_logits = -inf, lse = empty_lse and no gradient.

    Differentiable in q, kv and attn_sink through out; max_logits and lse carry no gradient. The
    gradient of kv is summed in fp32 in no fixed order. No gradient of gradients.
    deterministic: a row of the results and of q's gradient depends to the bit on no other row, nor
    on what ignored entries follow its last valid one; kv's gradient is summed in the order of the
    queries, for which `pairs` says the price.
    Raises ValueError for shapes, dtypes, devices and strides, BackendUnavailable for a backend
    that cannot run here. Source: the public FlashMLA interface; DeepSeek-V3.2, section 2.
    """
    check_queries_and_keys(q, kv, value_dim)
    check_lists(q, topk_indices, topk_length)
    check_sink(q, attn_sink)
    name = SPARSE_PREFILL.resolve_call(
        backend, q.device, hopper_call_refusal(q.dtype, q.shape[2], value_dim, softmax_scale),
        hopper_wins(q.shape[1], q.shape[2]),
    )  # fmt: skip
    return SparsePrefillResult(
        *torch.ops.model1.sparse_prefill(
            q, kv, topk_indices, topk_length, attn_sink,
            value_dim, softmax_scale, empty_lse, deterministic,
            name, backend,
        )
    )  # fmt: skip


@torch.library.custom_op("model1::sparse_prefill", mutates_args=())
def _sparse_prefill(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    value_dim: int,
    softmax_scale: float,
    empty_lse: float,
    deterministic: bool,
    backend: str,
    gradient_backend: str,  # as the caller named it: who asks for no gradient needs none
) -> tuple[Tensor, Tensor, Tensor]:
    return SPARSE_PREFILL.load(backend)(
        q, kv, topk_indices, topk_length=topk_length, attn_sink=attn_sink,
        value_dim=value_dim, softmax_scale=softmax_scale, empty_lse=empty_lse,
        deterministic=deterministic,
    )  # fmt: skip


@_sparse_prefill.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    t, h, _ = q.shape
    sums = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(t, h, args[4]), q.new_empty(t, h, dtype=sums), q.new_empty(t, h, dtype=sums)


_sparse_prefill.register_autograd(backward, setup_context=setup_context)
