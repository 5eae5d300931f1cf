"""Engram: hashed n-gram memory read by token ids alone (arXiv 2601.07372). The op's contract.

ids -> `engram_hash` -> rows -> `RowStore.gather` or an embedding -> projections (a module's
work) -> `engram_gate` [-> `engram_causal_conv` or
`engram_short_conv`] -> added to the residual streams.
Inputs are checked by shape and dtype; ids and rows out of range are an IndexError on the CPU, and
a kernel gives a row of -1, or channels of NaN, for them. Axis letters: t tokens, N places of an
n-gram (the token itself first), T tables, n residual streams, d channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.engram.checks import check_eps, check_for_kernel, check_int64, check_shape
from model1.ops.engram.conv import engram_causal_conv
from model1.ops.engram.gate import engram_gate
from model1.ops.engram.hashing import HashSpec, build_hash_specs, check_compression_table
from model1.ops.engram.ref import engram_hash_ref, engram_short_conv_ref
from model1.ops.engram.row_adam import row_adam_step, sum_equal_rows
from model1.ops.engram.rows import RowStore, quantize_rows

__all__ = [
    "HashSpec",
    "RowStore",
    "build_hash_specs",
    "check_compression_table",
    "engram_causal_conv",
    "engram_gate",
    "engram_hash",
    "engram_short_conv",
    "quantize_rows",
    "row_adam_step",
    "sum_equal_rows",
]

ENGRAM_HASH = Operator(
    name="engram_hash",
    implementations={
        "ref": "model1.ops.engram.ref:engram_hash_ref",
        "triton": "model1.ops.engram.portable_rows:engram_hash_triton",
    },
)


def engram_hash(
    ngram_token_ids: Tensor,
    compression_table: Tensor,
    multipliers: Tensor,
    table_sizes: Tensor,
    table_offsets: Tensor,
    *,
    pad_token_id: int,
    backend: str = "auto",
) -> Tensor:
    """Rows of the flat table that each token reads: [t, T] int64, order-major then head.

    mix_n = XOR_{i<n} c_i * multipliers[i],  n = 2..N;   row = mix_n mod table_size + table_offset

    ngram_token_ids: [t, N] int64, raw ids; column i is the token i places earlier. A negative id
    is the sequence start or a gap: it and everything further back read as pad_token_id. A token
    that is itself negative still gets legal rows; pass it to `engram_gate` as not live.
    compression_table: [vocab] int64. multipliers: [N] int64. table_sizes, table_offsets: [T].
    An id that the table lacks is an IndexError on the CPU; a kernel gives -1 for its rows. Every
    backend gives the same integers. Raises ValueError for shapes, dtypes and a negative
    pad_token_id, BackendUnavailable for a backend that cannot run here.
    Source: arXiv 2601.07372, section 2; the constants come from `build_hash_specs`.
    """
    check_int64("ngram_token_ids", ngram_token_ids, 2)
    check_int64("compression_table", compression_table, 1)
    check_int64("multipliers", multipliers, 1)
    check_int64("table_sizes", table_sizes, 1)
    check_int64("table_offsets", table_offsets, 1)
    num_places, num_tables = ngram_token_ids.shape[1], table_sizes.shape[0]
    if num_places < 2:
        raise ValueError(f"ngram_token_ids must have at least 2 columns, got {num_places}")
    if num_tables == 0 or num_tables % (num_places - 1) != 0:
        raise ValueError(
            f"table_sizes must be a multiple of the {num_places - 1} orders long, got {num_tables}"
        )
    if pad_token_id < 0:
        raise ValueError(f"pad_token_id must not be negative, got {pad_token_id}")
    check_shape("multipliers", multipliers, (num_places,))
    check_shape("table_offsets", table_offsets, (num_tables,))
    name = ENGRAM_HASH.resolve(backend, ngram_token_ids.device)
    constants = (compression_table, multipliers, table_sizes, table_offsets)
    if name == "ref":
        return engram_hash_ref(ngram_token_ids, *constants, pad_token_id)
    check_for_kernel(
        ngram_token_ids.device, is_floating=False, compression_table=compression_table,
        multipliers=multipliers, table_sizes=table_sizes, table_offsets=table_offsets,
    )  # fmt: skip
    return torch.ops.model1.engram_hash(ngram_token_ids, *constants, pad_token_id, name)


@torch.library.custom_op("model1::engram_hash", mutates_args=())
def _engram_hash(
    ngram_token_ids: Tensor, compression_table: Tensor, multipliers: Tensor, table_sizes: Tensor,
    table_offsets: Tensor, pad_token_id: int, backend: str,
) -> Tensor:  # fmt: skip
    return ENGRAM_HASH.load(backend)(
        ngram_token_ids, compression_table, multipliers, table_sizes, table_offsets, pad_token_id
    )


@_engram_hash.register_fake
def _(ngram_token_ids: Tensor, *args: Any) -> Tensor:
    return ngram_token_ids.new_empty((ngram_token_ids.shape[0], args[2].shape[0]))


def engram_short_conv(x: Tensor, weight: Tensor, norm_weight: Tensor, *, eps: float) -> Tensor:
    """SiLU(DWConv(RMSNorm(x))) of one explicit window per token: [t, n*d] in x's dtype.

    out[t, c] = silu(sum_j weight[c, j] * RMSNorm(x[t, j])[c])

    x: [t, K, n*d], the tokens that the taps see, oldest first, the token itself last, zeros before
    the sequence start. weight: [n*d, K]. norm_weight: [n, d]; the norm is
    per stream. A token's result does not depend on how the sequence was cut into chunks.
    Source: arXiv 2601.07372, section 2.3.
    """
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be [t, K, n*d] with K > 0, got shape {tuple(x.shape)}")
    if norm_weight.ndim != 2:
        raise ValueError(f"norm_weight must be [n, d], got shape {tuple(norm_weight.shape)}")
    num_tokens, num_taps, _ = x.shape
    channels = norm_weight.shape[0] * norm_weight.shape[1]
    check_shape("x", x, (num_tokens, num_taps, channels))
    check_shape("weight", weight, (channels, num_taps))
    check_eps(eps)
    return engram_short_conv_ref(x, weight, norm_weight, eps)
