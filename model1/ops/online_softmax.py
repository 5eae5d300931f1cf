"""Softmax attention over tiles of keys, one after the other: Triton device functions.

Of the keys seen so far a row keeps the largest base-2 logit m, the sum of 2^(logit - m), and the
sum of values with the same weights, which is cut into pieces of channels: one wide accumulator
would not stay in registers. A new tile raises m and scales both sums down (Milakov and Gimelshein,
arXiv:1805.02867; Dao et al., arXiv:2205.14135).
"""

# Device functions take Triton values of several types, and loops over tl.static_range exist only
# when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Where the largest logit begins: below every one in use, yet finite, since a row that has seen no
# key must not compute inf - inf.
LOWEST_LOGIT = tl.constexpr(-3.0e38)


@triton.jit
def scaled_scores(q, k, scale, SPLIT_SCORES: tl.constexpr):
    """scale * q . k^T of two tuples of pieces, [rows of q, rows of k] fp32.

    SPLIT_SCORES sums the pieces after the scaling, not as a chain of products; see `attend_tile`.
    """
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if SPLIT_SCORES:
        scores *= scale
        for i in tl.static_range(1, len(q)):
            scores += tl.dot(q[i], tl.trans(k[i]), input_precision="ieee") * scale
    else:
        for i in tl.static_range(1, len(q)):
            scores = tl.dot(q[i], tl.trans(k[i]), acc=scores, input_precision="ieee")
        scores *= scale
    return scores


@triton.jit
def scaled_pieces(pieces, factor):
    """Every piece times factor, one number or [rows, 1]."""
    new = ()
    for i in tl.static_range(len(pieces)):
        new += (pieces[i] * factor,)
    return new


@triton.jit
def add_products(pieces, x, y):
    """pieces + x . y; x [rows of pieces, rows of y], and y has at least as many pieces."""
    new = ()
    for i in tl.static_range(len(pieces)):
        new += (tl.dot(x, y[i], acc=pieces[i], input_precision="ieee"),)
    return new


@triton.jit
def _softmax_step(logits, is_visible, largest, total):
    """The weights of a tile's keys, the new maximum and sum, and the factor of all before."""
    if is_visible is not None:
        logits = tl.where(is_visible, logits, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - new_largest[:, None])
    decay = tl.exp2(largest - new_largest)
    return weights, new_largest, total * decay + tl.sum(weights, 1), decay


@triton.jit
def attend_tile(
    q, k, v, scale, is_visible, out, largest, total, is_tile, is_range, SPLIT_SCORES: tl.constexpr
):
    """One more tile of keys k and values v: the new `out`, `largest` and `total`.

    is_visible broadcasts to [rows of q, rows of k]; None shows every key. is_tile and is_range
    matter with SPLIT_SCORES only and are always true, which the compiler must not know: the loop's
    counter, and its first value, lie below its end.

    As branches they keep Triton from seeing that the score product feeds the value product. It
    gives the warps of such a feeder rows only, so that where there are more warps than rows several
    compute the same. They also place the copies of the next tile, which the compiler starts while
    this one is used, before the softmax.
    """
    logits = scaled_scores(q, k, scale, SPLIT_SCORES)
    if SPLIT_SCORES:
        if is_tile:
            decay = largest
            if is_range:
                logits, largest, total, decay = _softmax_step(logits, is_visible, largest, total)
            out = add_products(scaled_pieces(out, decay[:, None]), logits.to(k[0].dtype), v)
    else:
        weights, largest, total, decay = _softmax_step(logits, is_visible, largest, total)
        out = add_products(scaled_pieces(out, decay[:, None]), weights.to(k[0].dtype), v)
    return out, largest, total


@triton.jit
def merge_step(log2_sum, parts, out, largest, total):
    """Join the results of parts of one row's keys: the new `out`, `largest` and `total`.

    log2_sum [n] are their base-2 log-sum-exps, parts [n, c] their normalised outputs.
    """
    new_largest = tl.maximum(largest, tl.max(log2_sum, 0))
    weights = tl.exp2(log2_sum - new_largest)
    decay = tl.exp2(largest - new_largest)
    total = total * decay + tl.sum(weights, 0)
    return out * decay + tl.sum(parts * weights[:, None], 0), new_largest, total


@triton.jit
def log2_sum_of(largest, total):
    """The base-2 log-sum-exp, -inf without keys, and what `out` is to be multiplied with."""
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    return tl.where(is_empty, float("-inf"), largest + tl.log2(total)), 1.0 / total
