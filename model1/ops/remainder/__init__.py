"""The low-rank rest of a sparse softmax, and the merge of two partial attentions."""

from __future__ import annotations

from torch import Tensor

from model1.ops.remainder.ref import merge_ref, remainder_ref


def remainder(
    weights: Tensor,
    row_max: Tensor,
    z: Tensor,
    k_rope: Tensor,
    basis: Tensor,
    mean: Tensor,
    *,
    in_rest: Tensor,
    rotary_value: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens outside the exact core, from their r projected channels.

    out[i] = sum_j w_ij [basis^T z_j + mean, k_rope_j] / sum_j w_ij,  j in the rest
    lse[i] = row_max[i] + ln sum_j w_ij

    weights: [t, h, s] and row_max: [t, h] of `model1.ops.indexer.scan_weights`; z: [s, r];
    k_rope: [s, d_rope]; in_rest: [t, s] bool, visible and not in the core (disjoint from it,
    so nothing counts twice). The rotary channels join the value only with `rotary_value`.
    Returns out and lse as `sparse_attention` does; an empty rest gives out = 0, lse = -inf.
    """
    if in_rest.shape != (weights.shape[0], weights.shape[2]):
        raise ValueError(
            f"in_rest must be [{weights.shape[0]}, {weights.shape[2]}], got {list(in_rest.shape)}"
        )
    return remainder_ref(
        weights, row_max, z, k_rope, basis, mean, in_rest=in_rest, rotary_value=rotary_value
    )


def merge(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One softmax over two disjoint key sets from their separate results, [t, h, d] and [t, h].

    D = e^lse_a + e^lse_b + e^sink; out = (e^lse_a out_a + e^lse_b out_b) / D; the returned lse
    leaves the sink out. Rows empty on both sides give out = 0, lse = -inf.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape:
        raise ValueError(
            f"both sides must have one shape, got {list(out_a.shape)}, {list(out_b.shape)}"
        )
    return merge_ref(out_a, lse_a, out_b, lse_b, attn_sink)
