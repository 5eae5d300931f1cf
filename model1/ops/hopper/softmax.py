# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""Scores of a block of keys and the online softmax over blocks, for one warp group.

Logits are base 2; what `model1.ops.online_softmax` is to portable kernels.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.jit
def first_scores(q, k, LAYOUT: gl.constexpr):
    """q . k^T, fp32, of queries and keys in shared memory; to be waited for."""
    scores = gl.full([q.shape[0], k.shape[0]], 0.0, gl.float32, layout=LAYOUT)
    return warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)


@gluon.jit
def add_scores(q, k, scores):
    """`scores` plus q . k^T, to be waited for."""
    return warpgroup_mma(q, k.permute((1, 0)), scores, is_async=True)


@gluon.jit
def softmax_step(scores, largest, scale_log2):
    """The weights 2^(logit - new maximum) of a block, the factor of all before, the new maximum."""
    new_largest = gl.maximum(largest, gl.max(scores, 1) * scale_log2)
    # a row that has seen no key must not compute inf - inf
    shift = gl.where(new_largest == float("-inf"), 0.0, new_largest)
    return gl.exp2(scores * scale_log2 - shift[:, None]), gl.exp2(largest - shift), new_largest


@gluon.jit
def log2_sum(largest, total):
    """The base-2 log-sum-exp, -inf without keys, and what the output is to be multiplied with."""
    is_empty = total == 0.0
    total = gl.where(is_empty, 1.0, total)
    return gl.where(is_empty, float("-inf"), largest + gl.log2(total)), 1.0 / total
