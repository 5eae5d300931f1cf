"""Sparse prefill backward in Triton: one program per query and tile of heads.

With X = [q; dout] stacked, [2 heads, d], and W = [ds; p], a block of keys k needs three products:
X k^T (the logits and dp), ds k (its part of dq) and W^T X (the gradient of its rows). The last is
added to dkv by fp32 atomics or, to be reproducible, written to a buffer of (query, key) pairs
that `pairs` adds up in the order of the queries.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import device_target, launch_options
from model1.ops.online_softmax import LOG2_E, add_products, scaled_scores
from model1.ops.sparse_prefill.config import Config, backward_config
from model1.ops.sparse_prefill.pairs import (
    add_pairs,
    pair_constants,
    rows_per_buffer,
    sum_pairs_kernel,
)
from model1.ops.sparse_prefill.portable import MODELS, SIZES, check_dtype, compile_case
from model1.ops.sparse_prefill.tiles import (
    list_length,
    load_indices,
    load_pieces,
    num_pieces,
    piece_channels,
    piece_mask,
    piece_width,
    row_alignment,
    store_pieces,
    zero_pieces,
)

ROW_BLOCK, ROW_PIECE = 16, 128  # of `_row_sums_kernel`, which only reads two tensors once


@triton.jit
def _load_stacked(
    q_rows, dout_rows, is_row, is_dout,
    VALUE_DIM: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The pieces of X; the channels that dout lacks are 0."""
    rows = tl.where(is_dout[:, None], dout_rows, q_rows)
    pieces = ()
    for c in tl.static_range(num_pieces(D, PIECE)):
        channels = piece_channels(D, PIECE, c)[None, :]
        inside = piece_mask(is_row, D, D, PIECE, c)
        if c * PIECE + piece_width(D, PIECE, c) > VALUE_DIM:
            inside = inside & ((channels < VALUE_DIM) | (is_dout == 0)[:, None])
        pieces += (tl.load(rows + channels, mask=inside, other=0.0),)
    return pieces


@triton.jit
def _unstack(x):
    """The upper and the lower half of the rows of x."""
    halves = tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]])
    return tl.split(tl.permute(halves, [1, 2, 0]))


@triton.jit
def _stack(upper, lower):
    halves = tl.permute(tl.join(upper, lower), [2, 0, 1])
    return tl.reshape(halves, [2 * upper.shape[0], upper.shape[1]])


@triton.jit(do_not_specialize=SIZES)
def _row_sums_kernel(
    dout_ptr, out_ptr, lse_ptr, attn_sink_ptr, log2_total_ptr, delta_ptr, dsink_ptr,
    stride_dt, stride_dh, num_heads,
    VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_H: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Per query and head: log2 of the denominator, sum(out dout), and its part of dsink."""
    num_tiles = tl.cdiv(num_heads, BLOCK_H)
    i = (tl.program_id(0) // num_tiles).to(tl.int64)
    offs_h = (tl.program_id(0) % num_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = offs_h < num_heads
    row = i * num_heads + offs_h
    dout_rows = dout_ptr + (i * stride_dt + offs_h[:, None].to(tl.int64) * stride_dh) * ALIGN
    dout = load_pieces(dout_rows, is_head, VALUE_DIM, VALUE_DIM, PIECE)
    out = load_pieces(out_ptr + row[:, None] * VALUE_DIM, is_head, VALUE_DIM, VALUE_DIM, PIECE)
    delta = tl.zeros([BLOCK_H], tl.float32)
    for c in tl.static_range(len(out)):
        delta += tl.sum(out[c].to(tl.float32) * dout[c].to(tl.float32), 1)
    log2_total = tl.load(lse_ptr + row, mask=is_head, other=0.0) * LOG2_E
    if attn_sink_ptr is not None:
        sink = tl.load(attn_sink_ptr + offs_h, mask=is_head, other=0.0) * LOG2_E
        larger = tl.maximum(log2_total, sink)
        log2_total = larger + tl.log2(1.0 + tl.exp2(tl.minimum(log2_total, sink) - larger))
        # delta is 0 where the sink is +inf or the list empty; the sink's weight may be NaN there
        dsink = tl.where(delta == 0.0, 0.0, -tl.exp2(sink - log2_total) * delta)
        tl.store(dsink_ptr + row, dsink, mask=is_head)
    tl.store(log2_total_ptr + row, log2_total, mask=is_head)
    tl.store(delta_ptr + row, delta, mask=is_head)


@triton.jit(do_not_specialize=SIZES)
def _sparse_attn_bwd_kernel(
    dout_ptr, q_ptr, kv_ptr, topk_indices_ptr, topk_length_ptr, log2_total_ptr, delta_ptr,
    dq_ptr, dkv_ptr,
    stride_dt, stride_dh, stride_qt, stride_qh, stride_kv, stride_topk,
    first_row, num_heads, num_keys, topk, softmax_scale,
    D: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, DETERMINISTIC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """dq of the queries from first_row on, and dkv or, if DETERMINISTIC, the pairs in its place."""
    num_tiles = tl.cdiv(num_heads, BLOCK_H)
    i = first_row + (tl.program_id(0) // num_tiles).to(tl.int64)
    first_head = (tl.program_id(0) % num_tiles) * BLOCK_H
    offs_x = tl.arange(0, 2 * BLOCK_H)
    head_x = (first_head + offs_x % BLOCK_H).to(tl.int64)
    q_rows = q_ptr + (i * stride_qt + head_x[:, None] * stride_qh) * ALIGN
    dout_rows = dout_ptr + (i * stride_dt + head_x[:, None] * stride_dh) * ALIGN
    is_dout = offs_x >= BLOCK_H
    x = _load_stacked(q_rows, dout_rows, head_x < num_heads, is_dout, VALUE_DIM, D, PIECE)
    offs_h = first_head + tl.arange(0, BLOCK_H)
    is_head = offs_h < num_heads
    row = i * num_heads + offs_h
    log2_total = tl.load(log2_total_ptr + row, mask=is_head, other=0.0)
    delta = tl.load(delta_ptr + row, mask=is_head, other=0.0)

    length = list_length(topk_length_ptr, i, topk)
    entries = topk_indices_ptr + i * stride_topk
    dq = zero_pieces(BLOCK_H, D, D, PIECE)
    offs_n = tl.arange(0, BLOCK_N)
    # nothing is kept in registers from block to block that can be computed again
    for start in tl.range(0, length, BLOCK_N, disable_licm=BLOCK_N > 32):  # pyright: ignore
        index = load_indices(entries, start, length, BLOCK_N)
        is_key = (index >= 0) & (index < num_keys)
        key = tl.where(is_key, index, 0)[:, None].to(tl.int64)
        k = load_pieces(kv_ptr + key * stride_kv * ALIGN, is_key, D, D, PIECE)
        s, dp = _unstack(scaled_scores(x, k, 1.0, False))
        p = tl.exp2(s * (softmax_scale * LOG2_E) - log2_total[:, None])
        p = tl.where(is_key[None, :], p, 0.0)
        ds = (p * (dp - delta[:, None]) * softmax_scale).to(x[0].dtype)
        dq = add_products(dq, ds, k)
        w = _stack(ds, p.to(x[0].dtype)).T
        if DETERMINISTIC:
            # fits 32 bits: the launcher sees to it
            rows = dkv_ptr + (tl.program_id(0) * topk + start + offs_n)[:, None] * D
        else:
            rows = dkv_ptr + key * D
        for c in tl.static_range(num_pieces(D, PIECE)):
            dk = tl.dot(w, x[c], input_precision="ieee")
            pointers = rows + piece_channels(D, PIECE, c)[None, :]
            inside = piece_mask(is_key, D, D, PIECE, c)
            if DETERMINISTIC:
                tl.store(pointers, dk, mask=inside)
            else:
                tl.atomic_add(pointers, dk, mask=inside, sem="relaxed")
    store_pieces(dq_ptr + row[:, None] * D, is_head, dq, D, D, PIECE)


def row_sums(
    dout: Tensor, out: Tensor, lse: Tensor, attn_sink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log2 of the denominator and sum(out dout), both [t, h], and dsink [h] ([0] without)."""
    t, h, value_dim = out.shape
    log2_total, delta = torch.empty_like(lse), torch.empty_like(lse)
    dsink_rows = torch.empty_like(lse if attn_sink is not None else lse[:, :0])
    align = row_alignment(dout.stride(0), dout.stride(1))
    _row_sums_kernel[(t * -(-h // ROW_BLOCK),)](
        dout, out, lse, attn_sink, log2_total, delta, dsink_rows,
        dout.stride(0) // align, dout.stride(1) // align, h, **_row_constants(value_dim, align),
    )  # fmt: skip
    return log2_total, delta, dsink_rows.sum(0)


def rows_at_once(num_tiles: int, topk: int, d: int) -> int:
    """Queries whose pairs fit into the buffer; the kernel counts those of one query in 32 bits."""
    if (numbers := num_tiles * topk * d) >= 1 << 31:
        raise BackendUnavailable(
            f"sparse_prefill takes a list whose deterministic gradients are fewer than "
            f"2^31 numbers, got {numbers} ({num_tiles} tiles of heads x topk {topk} x d {d})"
        )
    return rows_per_buffer(num_tiles * topk, d)


def sparse_prefill_backward_triton(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    deterministic: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sparse_prefill_backward_ref`; `config` replaces the table's choice."""
    check_dtype(q)
    (t, h, d), topk = q.shape, topk_indices.shape[1]
    if config is None:
        config = backward_config(device_target(q.device), h, d, q.element_size(), deterministic)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dq = torch.empty(t, h, d, dtype=q.dtype, device=q.device)
    dkv = torch.zeros(kv.shape, dtype=torch.float32, device=q.device)
    num_tiles = -(-h // config.block_h)
    rows, sums = t, dkv
    if deterministic:
        rows = min(t, rows_at_once(num_tiles, topk, d))
        sums = torch.empty(rows * num_tiles * topk, d, dtype=torch.float32, device=q.device)
    fixed = _sizes(dout, q, kv, topk_indices) | launch_options(config.num_warps, config.num_stages)
    fixed |= _constants(config, d, out.shape[2], deterministic)
    with torch.cuda.device_of(q):
        log2_total, delta, dsink = row_sums(dout, out, lse, attn_sink)
        for first in range(0, t, max(rows, 1)):
            last = min(first + rows, t)
            _sparse_attn_bwd_kernel[((last - first) * num_tiles,)](
                dout, q, kv, topk_indices, topk_length, log2_total, delta, dq, sums,
                first_row=first, softmax_scale=softmax_scale, **fixed,
            )  # fmt: skip
            if deterministic:
                lengths = None if topk_length is None else topk_length[first:last]
                add_pairs(dkv, sums, topk_indices[first:last], lengths, num_tiles)
    return dq, dkv.to(kv.dtype), dsink


def _sizes(dout: Tensor, q: Tensor, kv: Tensor, topk_indices: Tensor) -> dict[str, Any]:
    strides = {
        "stride_dt": dout.stride(0), "stride_dh": dout.stride(1),
        "stride_qt": q.stride(0), "stride_qh": q.stride(1), "stride_kv": kv.stride(0),
    }  # fmt: skip
    align = row_alignment(*strides.values())
    return {
        **{name: stride // align for name, stride in strides.items()},
        "ALIGN": align, "stride_topk": topk_indices.stride(0), "topk": topk_indices.shape[1],
        "num_heads": q.shape[1], "num_keys": kv.shape[0],
    }  # fmt: skip


def _constants(config: Config, d: int, value_dim: int, deterministic: bool) -> dict[str, Any]:
    return {
        "D": d, "VALUE_DIM": value_dim, "DETERMINISTIC": deterministic,
        "BLOCK_H": config.block_h, "BLOCK_N": config.block_n, "PIECE": config.piece,
    }  # fmt: skip


def _row_constants(value_dim: int, align: int) -> dict[str, Any]:
    return {"VALUE_DIM": value_dim, "ALIGN": align, "BLOCK_H": ROW_BLOCK, "PIECE": ROW_PIECE}


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """The backward kernels as MODEL1 and V32 launch them in bf16, with many heads and with few."""
    defaults = {"num_warps": 4, "num_stages": 3}
    cases = [compile_case("row sums", _row_sums_kernel, _row_constants(512, 8), defaults)]
    for name, d in MODELS.items():
        cases.append(compile_case(f"{name} pairs", sum_pairs_kernel, pair_constants(d), defaults))
        for h in (64, 16):
            for deterministic in (False, True):
                config = backward_config(target, h, d, 2, deterministic)
                constants = _constants(config, d, 512, deterministic) | {"ALIGN": 8}
                kind = f"{name} h{h}" + " deterministic" * deterministic
                options = launch_options(config.num_warps, config.num_stages)
                cases.append(compile_case(kind, _sparse_attn_bwd_kernel, constants, options))
    return cases
