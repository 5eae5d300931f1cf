"""`flash_mla_sparse_fwd`: each query attends to its own list of rows of one unpaged tensor."""

from __future__ import annotations

import math

from torch import Tensor

from model1.flash_mla.metadata import refusals_as_runtime_errors, require_entries
from model1.ops.sparse_prefill import sparse_prefill


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse prefill over one sequence; flatten a batch and offset its indices.

    out = softmax(sm_scale q k^T) v over the rows of kv that `indices` names; v = kv[..., :d_v]

    q: [s_q, h_q, d]. kv: [s_kv, 1, d]. indices: [s_q, 1, topk] int32; one outside 0 .. s_kv - 1
    is ignored. topk_length: [s_q] int32, entries counted per query. attn_sink: [h_q] fp32, part
    of out alone.
    Returns out [s_q, h_q, d_v], max_logits [s_q, h_q] fp32, the largest sm_scale q k, and the
    natural-log lse [s_q, h_q] fp32. A query without keys has out = 0, max_logits = -inf,
    lse = +inf. Differentiable in q and kv. Raises RuntimeError for tensors that cannot be used.
    Source: the public FlashMLA interface.
    """
    with refusals_as_runtime_errors():
        for name, tensor in (("kv", kv), ("indices", indices)):
            if tensor.dim() != 3 or tensor.shape[1] != 1:
                raise ValueError(f"{name} must be [rows, 1, width], got {list(tensor.shape)}")
        require_entries("indices", indices)
        return sparse_prefill(
            q, kv.squeeze(1), indices.squeeze(1),
            value_dim=d_v, softmax_scale=sm_scale, topk_length=topk_length,
            attn_sink=attn_sink, empty_lse=math.inf,
        )  # fmt: skip
