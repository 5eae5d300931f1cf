"""Selector of token-level sparse attention: a low-rank scan picks each query's exact core.

The scan works on z_j = P (c_j - mu), r channels of the position-free latent, and on the rotary
key channels as they are. The same scores serve the remainder (`model1.ops.remainder`).
"""

from __future__ import annotations

from torch import Tensor

from model1.ops.indexer.ref import lowrank_scores_ref, scan_weights_ref, select_core_ref


def lowrank_scores(
    q: Tensor, z: Tensor, k_rope: Tensor, basis: Tensor, mean: Tensor, *, softmax_scale: float
) -> Tensor:
    """Approximate logits of every key, [t, h, s] fp32.

    scores[i, h, j] = scale * (q_nope . mean + (basis q_nope) . z[j] + q_rope . k_rope[j])

    q: [t, h, d_nope + d_rope]; z: [s, r]; k_rope: [s, d_rope]; basis: [r, d_nope] with orthonormal
    rows; mean: [d_nope]; all floating point, multiplied in q's dtype. Exact when r = d_nope. t = 0
    and s = 0 give an empty result, NaN spoils the scores of its query or key. Causality is the
    caller's business. Differentiable. Raises ValueError for widths that do not fit together.
    The scan is ours; docs/architecture.md has its place.
    """
    d_nope = mean.shape[0]
    if basis.shape != (z.shape[-1], d_nope):
        raise ValueError(f"basis must be [{z.shape[-1]}, {d_nope}], got {list(basis.shape)}")
    if q.shape[-1] != d_nope + k_rope.shape[-1]:
        raise ValueError(f"q must have {d_nope} + {k_rope.shape[-1]} channels, got {q.shape[-1]}")
    return lowrank_scores_ref(q, z, k_rope, basis, mean, softmax_scale=softmax_scale)


def scan_weights(scores: Tensor, key_start: Tensor, key_end: Tensor) -> tuple[Tensor, Tensor]:
    """e^(scores - row_max) of the visible keys, 0 elsewhere, [t, h, s], and row_max [t, h] fp32.

    Keys key_start[i] <= j < key_end[i] are visible. One exponential serves both the choice of the
    core and the remainder. With gradients off, hidden entries of `scores` become -inf in place.
    """
    if key_start.shape != (scores.shape[0],) or key_end.shape != (scores.shape[0],):
        raise ValueError(f"key_start and key_end must be [{scores.shape[0]}]")
    return scan_weights_ref(scores, key_start, key_end)


def select_core(
    weights: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    core_count: Tensor,
    *,
    topk: int,
    sliding_window: int,
) -> Tensor:
    """Indices of the keys attended exactly, [t, min(topk, s)] int64, -1 = unused.

    weights: [t, h, s] of `scan_weights`. The last `sliding_window` visible keys are always taken,
    then those with the largest approximate probability summed over heads, until core_count[i]
    are chosen (all visible ones if there are fewer). One set serves all heads, so that the exact
    pass stays a gather of shared rows. No gradient passes through the choice.
    """
    if topk < sliding_window:
        raise ValueError(f"topk must be at least sliding_window {sliding_window}, got {topk}")
    if core_count.shape != (weights.shape[0],):
        raise ValueError(f"core_count must be [{weights.shape[0]}], got {list(core_count.shape)}")
    return select_core_ref(
        weights.detach(), key_start, key_end, core_count, topk=topk, sliding_window=sliding_window
    )
