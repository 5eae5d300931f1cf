"""Token-level sparse attention: low-rank selector, exact core, low-rank remainder, one softmax.

The projection z = P (c - mu) of the position-free latent is selector, remainder logits and
remainder values at once (one scan). Exact when r equals the latent width, or when every visible
token is in the core.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model1.config import ModelConfig, SparseConfig
from model1.nn.layers import new_weight
from model1.ops.dense_attention import range_mask
from model1.ops.indexer import lowrank_scores, scan_weights, select_core
from model1.ops.remainder import merge, remainder
from model1.ops.sparse_attention import sparse_attention

# Rows of queries handled at once: bounds the gathered core to rows * index_topk * d elements.
ROW_CHUNK = 64


class SparseResult(NamedTuple):
    """Output of one sparse pass and what its training losses need."""

    out: Tensor  # [t, h, value_dim]
    lse: Tensor  # [t, h] fp32, sink left out
    scores: Tensor  # [t, h, s] fp32, approximate logits; hidden keys may be -inf


def core_count(num_visible: Tensor, sparse: SparseConfig, sliding_window: int) -> Tensor:
    """Tokens attended exactly out of n = num_visible [t]: min(n, max(w, min(K, rho n)))."""
    share = torch.ceil(num_visible.to(torch.float64) * sparse.core_fraction).long()
    count = share.clamp(max=sparse.index_topk).clamp(min=sliding_window)
    return torch.minimum(count, num_visible)


def attention_cost(config: ModelConfig, num_visible: int) -> float:
    """Multiply-adds of one query relative to dense attention over num_visible tokens.

    C = rho + (1 - rho) c_rem + c_sel, rotary channels counted; 1.0 where the query runs dense.
    """
    if config.sparse is None or num_visible <= config.sparse.dense_below:
        return 1.0
    attention = config.attention
    dense = attention.latent_dim + config.value_dim
    rotary = attention.qk_rope_head_dim
    scan = (config.sparse.index_rank + rotary) / dense
    rest_value = config.sparse.index_rank + (rotary if config.vvpa.rotary_value else 0)
    count = core_count(torch.tensor([num_visible]), config.sparse, attention.sliding_window)
    rho = count.item() / num_visible
    return rho + (1.0 - rho) * rest_value / dense + scan


class LowRankSelector(nn.Module):
    """Orthonormal basis P [r, d_nope] and mean mu [d_nope] of one layer's latents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.sparse is not None
        dim, rank = config.attention.latent_nope_dim, config.sparse.index_rank
        basis = new_weight(dim, rank, std=1.0).data
        if not basis.is_meta:
            basis = torch.linalg.qr(basis)[0]
        self.basis = nn.Parameter(basis.T.contiguous())
        self.mean = nn.Parameter(torch.zeros(dim))
        self.sparse = config.sparse
        self.sliding_window = config.attention.sliding_window
        self.rotary_value = config.vvpa.rotary_value

    def project(self, latent: Tensor) -> Tensor:
        """z = P (c - mu): [s, d_nope] to [s, r]."""
        return F.linear(latent - self.mean.type_as(latent), self.basis.type_as(latent))

    @torch.no_grad()
    def retract(self) -> None:
        """Make the rows of P orthonormal again after an optimiser step."""
        q, r = torch.linalg.qr(self.basis.float().T)
        self.basis.copy_((q * r.diagonal().sign()).T)

    def attend(
        self,
        q: Tensor,
        z: Tensor,
        kv: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        *,
        value_dim: int,
        softmax_scale: float,
        attn_sink: Tensor | None,
    ) -> SparseResult:
        """Sparse attention of q [t, h, d] over the keys key_start <= j < key_end of one request.

        z [s, r] and kv [s, d]: the projections and the latents of all keys.
        """
        k_rope = kv[:, self.basis.shape[1] :]
        scores = lowrank_scores(q, z, k_rope, self.basis, self.mean, softmax_scale=softmax_scale)
        weights, row_max = scan_weights(scores, key_start, key_end)
        count = core_count(key_end - key_start, self.sparse, self.sliding_window)
        topk_indices = select_core(
            weights, key_start, key_end, count,
            topk=int(count.max()), sliding_window=min(self.sliding_window, int(count.max())),
        )  # fmt: skip
        valid = topk_indices >= 0
        core = kv[topk_indices.clamp(min=0)] * valid.unsqueeze(-1).to(kv.dtype)
        core_out, core_lse = sparse_attention(
            q, core, valid=valid, value_dim=value_dim, softmax_scale=softmax_scale
        )
        in_rest = range_mask(z.shape[0], key_start, key_end)
        spare = torch.cat([in_rest, in_rest.new_zeros(len(in_rest), 1)], dim=1)
        spare.scatter_(1, topk_indices.masked_fill(~valid, z.shape[0]), False)
        rest_out, rest_lse = remainder(
            weights, row_max, z.to(q.dtype), k_rope.to(q.dtype), self.basis, self.mean,
            in_rest=spare[:, :-1], rotary_value=self.rotary_value,
        )  # fmt: skip
        out, lse = merge(core_out, core_lse, rest_out, rest_lse, attn_sink)
        return SparseResult(out, lse, scores)
