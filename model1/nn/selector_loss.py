"""Training losses of the low-rank selector, on a sample of query rows.

    loss = |o_sparse - o_dense|^2 / |o_dense|^2  +  KL(p_dense || p_scan)

p is attention summed over heads and normalised; p_scan comes from the approximate logits. Queries
and latents are detached, so the backbone learns from the language-model loss alone
(DeepSeek-V3.2 trains its indexer the same way).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model1.nn.attention import AttendSpec
from model1.nn.indexer import LowRankSelector
from model1.ops.dense_attention import range_mask
from model1.ops.sparse_attention import sparse_attention


def sample_rows(num_visible: Tensor, dense_below: int, count: int) -> Tensor:
    """Up to `count` evenly spaced row numbers among those that see more than dense_below tokens.

    num_visible: [t] integer. Returns int64 row numbers, ascending, on its device; empty where no
    row sees that many. The host waits for the device. The choice is ours, without randomness.
    """
    rows = torch.nonzero(num_visible > dense_below)[:, 0]
    if len(rows) <= count:
        return rows
    picks = torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()
    return rows[picks]


def selector_loss(
    q: Tensor,
    kv: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    spec: AttendSpec,
    d_nope: int,
    rows: Tensor,
) -> Tensor:
    """Mean loss of the given rows of one packed row; q [s, h, d], kv [s, d]; an fp32 scalar.

    Zero without rows. Gradients reach the selector's basis and mean only.
    """
    selector = spec.selector
    assert isinstance(selector, LowRankSelector)
    with torch.enable_grad():
        if len(rows) == 0:
            return (selector.basis.sum() + selector.mean.sum()) * 0.0
        q, kv = q[rows].detach().float(), kv.detach().float()
        start, end = key_start[rows], key_end[rows]
        dense_out, dense_p = _dense_teacher(q, kv, start, end, spec)
        z = selector.project(kv[:, :d_nope])
        result = selector.attend(
            q, z, kv, start, end,
            value_dim=spec.value_dim, softmax_scale=spec.softmax_scale,
            attn_sink=None if spec.attn_sink is None else spec.attn_sink.detach(),
        )  # fmt: skip
        error = (result.out - dense_out).square().sum(-1) / dense_out.square().sum(-1).clamp(1e-8)
        hidden = ~range_mask(len(kv), start, end)
        scan_p = result.scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1).mean(1)
        ratio = dense_p.clamp(1e-9).log() - scan_p.clamp(1e-9).log()
        return error.mean() + (dense_p * ratio).sum(-1).mean()


@torch.no_grad()
def _dense_teacher(
    q: Tensor, kv: Tensor, start: Tensor, end: Tensor, spec: AttendSpec
) -> tuple[Tensor, Tensor]:
    """Dense outputs [m, h, value_dim] and head-averaged probabilities [m, s]."""
    scores = torch.einsum("mhd,sd->mhs", q, kv) * spec.softmax_scale
    visible = range_mask(len(kv), start, end)
    p = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    out, lse = sparse_attention(
        q, kv.expand(len(q), -1, -1), valid=visible,
        value_dim=spec.value_dim, softmax_scale=spec.softmax_scale,
    )  # fmt: skip
    if spec.attn_sink is not None:
        out = out * torch.sigmoid(lse - spec.attn_sink).unsqueeze(-1)
    return out, p.mean(1)
