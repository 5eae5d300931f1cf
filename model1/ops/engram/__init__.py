"""Engram: hashed n-gram memory read by token ids alone (arXiv 2601.07372). The op's contract.

ids -> `engram_hash` -> rows -> `RowStore.gather` or an embedding -> projections (a module's
work) -> `engram_gate` [-> `engram_short_conv`] -> added to the residual streams.
Inputs are checked here, by shape and dtype; ids and rows out of range are an IndexError of the
gather on the CPU and are not looked for on a GPU. Axis letters: t tokens, N places of an n-gram
(the token itself first), T tables, n residual streams, d channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.engram.hashing import HashSpec, build_hash_specs, check_compression_table
from model1.ops.engram.ref import engram_gate_ref, engram_hash_ref, engram_short_conv_ref
from model1.ops.engram.rows import RowStore, quantize_rows

__all__ = [
    "HashSpec",
    "RowStore",
    "build_hash_specs",
    "check_compression_table",
    "engram_gate",
    "engram_hash",
    "engram_short_conv",
    "quantize_rows",
]


def engram_hash(
    ngram_token_ids: Tensor,
    compression_table: Tensor,
    multipliers: Tensor,
    table_sizes: Tensor,
    table_offsets: Tensor,
    *,
    pad_token_id: int,
) -> Tensor:
    """Rows of the flat table that each token reads: [t, T] int64, order-major then head.

    mix_n = XOR_{i<n} c_i * multipliers[i],  n = 2..N;   row = mix_n mod table_size + table_offset

    ngram_token_ids: [t, N] int64, raw ids; column i is the token i places earlier. A negative id
    is the sequence start or a gap: it and everything further back read as pad_token_id. A token
    that is itself negative still gets legal rows; pass it to `engram_gate` as not live.
    compression_table: [vocab] int64. multipliers: [N] int64. table_sizes, table_offsets: [T].
    Source: arXiv 2601.07372, section 2; the constants come from `build_hash_specs`.
    """
    _check_int64("ngram_token_ids", ngram_token_ids, 2)
    _check_int64("compression_table", compression_table, 1)
    _check_int64("multipliers", multipliers, 1)
    _check_int64("table_sizes", table_sizes, 1)
    _check_int64("table_offsets", table_offsets, 1)
    num_places, num_tables = ngram_token_ids.shape[1], table_sizes.shape[0]
    if num_places < 2:
        raise ValueError(f"ngram_token_ids must have at least 2 columns, got {num_places}")
    if num_tables == 0 or num_tables % (num_places - 1) != 0:
        raise ValueError(
            f"table_sizes must be a multiple of the {num_places - 1} orders long, got {num_tables}"
        )
    if pad_token_id < 0:
        raise ValueError(f"pad_token_id must not be negative, got {pad_token_id}")
    _check_shape("multipliers", multipliers, (num_places,))
    _check_shape("table_offsets", table_offsets, (num_tables,))
    return engram_hash_ref(
        ngram_token_ids, compression_table, multipliers, table_sizes, table_offsets, pad_token_id
    )


def engram_gate(
    h: Tensor,
    key: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    live: Tensor | None = None,
    signed_sqrt: bool = True,
) -> tuple[Tensor, Tensor]:
    """Weigh the memory by how well its key fits each residual stream; (out, gate).

    s = <RMSNorm(h) * norm_weight, RMSNorm(key)> / sqrt(d);   u = sign(s) sqrt(max(|s|, 1e-6))
    gate = sigmoid(u);   out = gate * value      (u = s without signed_sqrt)

    h, key: [t, n, d]. value: [t, d], shared by the streams. norm_weight: [n, d], the product of
    the query's and the key's norm weights. live: [t] bool, gate 0 where false; None = all live.
    out is [t, n, d] in h's dtype; gate is [t, n] in fp32 (fp64 if h is), as is all arithmetic.
    Differentiable in h, key, value and norm_weight; no gradient passes s where |s| < 1e-6.
    Source: arXiv 2601.07372, section 2.3; the signed root is that of the released code.
    """
    if h.ndim != 3:
        raise ValueError(f"h must be [t, n, d], got shape {tuple(h.shape)}")
    num_tokens, num_streams, dim = h.shape
    _check_shape("key", key, (num_tokens, num_streams, dim))
    _check_shape("value", value, (num_tokens, dim))
    _check_shape("norm_weight", norm_weight, (num_streams, dim))
    _check_eps(eps)
    if live is not None:
        _check_shape("live", live, (num_tokens,))
        if live.dtype != torch.bool:
            raise ValueError(f"live must be bool, got {live.dtype}")
    return engram_gate_ref(h, key, value, norm_weight, live, eps, signed_sqrt)


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
    _check_shape("x", x, (num_tokens, num_taps, channels))
    _check_shape("weight", weight, (channels, num_taps))
    _check_eps(eps)
    return engram_short_conv_ref(x, weight, norm_weight, eps)


# The messages are built on failure only: these checks run for every layer of every step.
def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _check_int64(name: str, tensor: Tensor, ndim: int) -> None:
    if tensor.dtype != torch.int64 or tensor.ndim != ndim:
        raise ValueError(
            f"{name} must be int64 with {ndim} axes, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _check_eps(eps: float) -> None:
    if eps <= 0:
        raise ValueError(f"eps must be positive, got {eps}")
