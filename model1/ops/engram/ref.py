"""Engram in plain PyTorch: any device, differentiable, traceable by torch.compile.

No data-dependent Python control flow and no shape checks: `model1.ops.engram` has checked.
Every output row depends on its own input row only, by the same operations whatever the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vecdot

# Below this |s| the signed square root is constant, so that its slope stays finite.
# Source: arXiv 2601.07372, released code.
GATE_SCORE_MIN = 1e-6


def engram_hash_ref(
    ngram_token_ids: Tensor,
    compression_table: Tensor,
    multipliers: Tensor,
    table_sizes: Tensor,
    table_offsets: Tensor,
    pad_token_id: int,
) -> Tensor:
    """Oracle of `engram_hash`; int64 throughout."""
    num_orders = ngram_token_ids.shape[1] - 1
    # Latched: behind the first negative id every place counts as pad.
    dead = (ngram_token_ids < 0).cumsum(1) > 0
    compressed = compression_table.take(ngram_token_ids.masked_fill(dead, pad_token_id))
    mix, *terms = (compressed * multipliers).unbind(1)
    mixes: list[Tensor] = []
    for term in terms:
        mix = mix ^ term
        mixes.append(mix)
    # [t, N-1, 1] against [N-1, K]: the heads of one order differ in their prime only.
    rows = torch.stack(mixes, dim=1).unsqueeze(2) % table_sizes.view(num_orders, -1)
    return rows.flatten(1) + table_offsets


def engram_gate_ref(
    h: Tensor,
    key: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    live: Tensor | None,
    eps: float,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Oracle of `engram_gate`; fp32, or fp64 when h is fp64.

    The third result is what the gradient needs of each token and stream, [3, t, n]: the score s
    and, over sqrt(d), the inverse rms of h and of key.
    """
    out, gate, *scores = gate_steps_ref(h, key, value, norm_weight, live, eps, signed_sqrt)
    return out, gate, torch.stack(scores)


def gate_steps_ref(
    h: Tensor,
    key: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    live: Tensor | None,
    eps: float,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, gate and the three parts of the oracle's third result, for PyTorch to differentiate."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    query, key, dim = h.to(dtype), key.to(dtype), h.shape[-1]
    # 1 / rms = sqrt(d) / norm for each side; with the score's 1 / sqrt(d), sqrt(d) remains.
    # The two roots stay apart: under a tiny eps the product of the squares would underflow.
    query_scale = (vecdot(query, query) + eps * dim).rsqrt()
    key_scale = (vecdot(key, key) + eps * dim).rsqrt()
    score = vecdot(query * norm_weight.to(dtype), key) * query_scale * key_scale * dim**0.5
    root = score
    if signed_sqrt:
        # clamp passes no gradient where it acts, and sign never does.
        root = score.sign() * score.abs().clamp(min=GATE_SCORE_MIN).sqrt()
    gate = _sigmoid(root)
    if live is not None:
        gate = gate * live.unsqueeze(-1)
    out = gate.unsqueeze(-1) * value.to(dtype).unsqueeze(1)
    return out.to(h.dtype), gate, score, query_scale, key_scale


def engram_gate_backward_ref(
    grad: Tensor,
    d_gate: Tensor | None,
    h: Tensor,
    key: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    gate: Tensor,
    scores: Tensor,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, key, value and norm_weight; gate and scores are the oracle's.

    ds = (<grad, value> + d_gate) gate (1 - gate) / (2 sqrt(|s|)), 0 where |s| < 1e-6;
    d_h = ds (ds/dP weight key - s h / |h|^2), and likewise of key; P = <h weight, key>
    """
    dtype = scores.dtype
    query, wide_key, weight = h.to(dtype), key.to(dtype), norm_weight.to(dtype)
    score, query_scale, key_scale = (x.unsqueeze(-1) for x in scores.unbind())
    grad, wide_gate = grad.to(dtype), gate.unsqueeze(-1)
    d_score = vecdot(grad, value.to(dtype).unsqueeze(1)).unsqueeze(-1)
    if d_gate is not None:
        d_score = d_score + d_gate.unsqueeze(-1)
    root = score.sign() * score.abs().clamp(min=GATE_SCORE_MIN).sqrt() if signed_sqrt else score
    d_score = d_score * wide_gate * _sigmoid(-root)  # a gate of 0 stands for a dead token
    if signed_sqrt:
        d_score = (d_score * 0.5 / root.abs()).masked_fill(score.abs() < GATE_SCORE_MIN, 0)
    product = d_score * h.shape[-1] ** 0.5 * query_scale * key_scale
    d_h = product * weight * wide_key - d_score * score * query_scale.square() * query
    d_key = product * weight * query - d_score * score * key_scale.square() * wide_key
    d_value = (grad * wide_gate).sum(1)
    d_weight = (product * query * wide_key).sum(0)
    return d_h.to(h), d_key.to(key), d_value.to(value), d_weight.to(norm_weight)


def engram_short_conv_ref(x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Oracle of `engram_short_conv`; fp32, or fp64 when x is fp64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    branches = x.to(dtype).unflatten(2, norm_weight.shape)
    rstd = torch.rsqrt(branches.square().mean(-1, keepdim=True) + eps)
    normed = (branches * rstd * norm_weight.to(dtype)).flatten(2)
    taps = weight.to(dtype).unbind(1)
    # Added tap by tap: a library sum may pick its order by shape, and a token must not change
    # with the size of the chunk it is computed in.
    total = normed[:, 0] * taps[0]
    for tap in range(1, len(taps)):
        total = total + normed[:, tap] * taps[tap]
    return (total * _sigmoid(total)).to(x.dtype)


def _sigmoid(x: Tensor) -> Tensor:
    """Of each number the same bits wherever it lies: with AVX-512 PyTorch's own rounds the last
    numbers of a tensor differently, and a token must not change with what is beside it."""
    return F.logsigmoid(x).exp()


def engram_causal_conv_ref(
    x: Tensor, positions: Tensor, weight: Tensor, norm_weight: Tensor, dilation: int, eps: float
) -> Tensor:
    """Oracle of `engram_causal_conv`: the window of each token, then `engram_short_conv_ref`."""
    row = torch.arange(len(x), device=x.device)
    back = torch.arange(weight.shape[1] - 1, -1, -1, device=x.device) * dilation
    is_inside = positions[:, None] >= back
    window = x[(row[:, None] - back).clamp(min=0)] * is_inside.unsqueeze(-1).to(x.dtype)
    return engram_short_conv_ref(window, weight, norm_weight, eps)


def engram_causal_conv_backward_ref(
    grad: Tensor, x: Tensor, positions: Tensor, weight: Tensor, norm_weight: Tensor,
    dilation: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and norm_weight.

    With y = x / rms and the sum z under the SiLU:  dz = grad silu'(z), and tap j of channel c gets
    sum_t dz[t] y[t - back_j]; v[t] = norm_weight sum_j weight_j dz[t + back_j];
    d_x = (v - y mean(v y)) / rms
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    t, num_taps = len(x), weight.shape[1]
    branches = x.to(dtype).unflatten(1, norm_weight.shape)
    rstd = torch.rsqrt(branches.square().mean(-1, keepdim=True) + eps)
    y, scale = (branches * rstd).flatten(1), norm_weight.to(dtype).flatten()
    taps, earlier, masks, z = weight.to(dtype), [], [], torch.zeros_like(y)
    for j in range(num_taps):
        back = (num_taps - 1 - j) * dilation
        is_inside = (positions >= back).unsqueeze(-1)
        seen = torch.cat([y.new_zeros(min(back, t), y.shape[1]), y[: max(t - back, 0)]])
        earlier.append(torch.where(is_inside, seen, 0.0))
        masks.append((back, is_inside))
        z = z + earlier[-1] * scale * taps[:, j]
    sigmoid = _sigmoid(z)
    dz = grad.to(dtype) * sigmoid * (1 + z * (1 - sigmoid))
    by_tap = torch.stack([(dz * seen).sum(0) for seen in earlier], dim=1)
    v = torch.zeros_like(y)
    for j, (back, is_inside) in enumerate(masks):
        later = torch.where(is_inside, dz, 0.0)[back:] * (scale * taps[:, j])
        v[: len(later)] += later
    v, y = v.view_as(branches), y.view_as(branches)
    d_x = (v - y * (v * y).mean(-1, keepdim=True)) * rstd
    d_norm_weight = (by_tap * taps).sum(1).view_as(norm_weight)
    d_weight = by_tap * scale.unsqueeze(1)
    return d_x.flatten(1).to(x), d_weight.to(weight), d_norm_weight.to(norm_weight)
