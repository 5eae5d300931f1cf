"""Packed causal training attention through PyTorch's FlexAttention (CUDA only)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)


@cache
def _compiled(function: Any) -> Any:
    # Uncompiled, both functions materialise the full score matrix.
    return torch.compile(function, dynamic=False)


def _fast(function: Any, device: torch.device) -> Any:
    """Compiled on a GPU, unless the caller is being compiled with what it calls."""
    is_plain = device.type != "cuda" or torch.compiler.is_compiling()
    return function if is_plain else _compiled(function)


def packed_block_mask(doc_starts: Tensor) -> BlockMask:
    """Causal mask inside each document; doc_starts [b, s] is the column where it begins."""
    b, s = doc_starts.shape

    def visible(i_b: Tensor, _h: Tensor, i_q: Tensor, i_k: Tensor) -> Tensor:
        return (i_k <= i_q) & (i_k >= doc_starts[i_b, i_q])

    make = _fast(create_block_mask, doc_starts.device)
    return make(visible, b, None, s, s, device=doc_starts.device)


def flex_dense_attention(
    q: Tensor,
    kv: Tensor,
    block_mask: BlockMask,
    *,
    value_dim: int,
    softmax_scale: float,
    attn_sink: Tensor | None,
) -> Tensor:
    """Same formula as `dense_attention` for b rows at once: q [b, s, h, d], kv [b, s, d].

    Returns out [b, s, h, value_dim]. The sink enters as out * sigmoid(lse - sink).
    """
    # The sink is compiled along: by itself it would read and write `out` and its gradient
    # several times more.
    return _fast(_attend, q.device)(q, kv, block_mask, value_dim, softmax_scale, attn_sink)


def _attend(
    q: Tensor,
    kv: Tensor,
    block_mask: BlockMask,
    value_dim: int,
    softmax_scale: float,
    attn_sink: Tensor | None,
) -> Tensor:
    out, aux = flex_attention(
        q.transpose(1, 2),
        kv[:, None],
        kv[:, None, :, :value_dim],
        block_mask=block_mask,
        scale=softmax_scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    if attn_sink is not None:
        assert aux.lse is not None
        out = out * torch.sigmoid(aux.lse - attn_sink[None, :, None])[..., None].to(out.dtype)
    return out.transpose(1, 2)
