"""Sparse prefill forward in Triton: one program per query and tile of heads.

A program walks its list in blocks of BLOCK_N keys. It gathers whole rows of kv, which serve as
keys and, in their first VALUE_DIM channels, as values; on NVIDIA the gather is asynchronous and
one block ahead of the products. Logits are in base 2.
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
from model1.ops.online_softmax import LN_2, LOG2_E, LOWEST_LOGIT, attend_tile, scaled_pieces
from model1.ops.sparse_prefill.config import Config, forward_config
from model1.ops.sparse_prefill.tiles import (
    list_length,
    load_indices,
    load_pieces,
    row_alignment,
    store_pieces,
    zero_pieces,
)

MODELS = {"MODEL1": 512, "V32": 576}  # channels of a row; both have 512 of values
_TYPES = (
    dict.fromkeys(("q_ptr", "kv_ptr", "out_ptr", "dout_ptr", "dq_ptr"), "*bf16")
    | dict.fromkeys(("max_logits_ptr", "lse_ptr", "attn_sink_ptr", "log2_total_ptr"), "*fp32")
    | dict.fromkeys(("delta_ptr", "dsink_ptr", "dkv_ptr", "pairs_ptr"), "*fp32")
    | dict.fromkeys(("topk_indices_ptr", "topk_length_ptr"), "*i32")
    | dict.fromkeys(("order_ptr", "ends_ptr"), "*i64")
    | dict.fromkeys(("softmax_scale", "empty_lse"), "fp32")
)
# Numbers of which no value is worth a compilation of its own; strides count multiples of ALIGN.
SIZES = [
    "num_heads", "num_keys", "topk", "first_row", "stride_topk",
    "stride_qt", "stride_qh", "stride_kv", "stride_dt", "stride_dh",
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _sparse_attn_fwd_kernel(
    q_ptr, kv_ptr, topk_indices_ptr, topk_length_ptr, attn_sink_ptr,
    out_ptr, max_logits_ptr, lse_ptr,
    stride_qt, stride_qh, stride_kv, stride_topk,
    num_heads, num_keys, topk, softmax_scale, empty_lse,
    D: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr, SPLIT_SCORES: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one query over its list; the head tiles of a query are neighbours."""
    num_tiles = tl.cdiv(num_heads, BLOCK_H)
    i = (tl.program_id(0) // num_tiles).to(tl.int64)
    offs_h = (tl.program_id(0) % num_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = offs_h < num_heads
    q_rows = q_ptr + (i * stride_qt + offs_h[:, None].to(tl.int64) * stride_qh) * ALIGN
    q = load_pieces(q_rows, is_head, D, D, PIECE)

    length = list_length(topk_length_ptr, i, topk)
    entries = topk_indices_ptr + i * stride_topk
    m = tl.full([BLOCK_H], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = zero_pieces(BLOCK_H, VALUE_DIM, D, PIECE)
    # indices are read one block ahead, so that the gather never waits for them
    index = load_indices(entries, 0, length, BLOCK_N)
    # nothing is kept in registers from block to block that can be computed again
    for start in tl.range(0, length, BLOCK_N, disable_licm=SPLIT_SCORES):
        is_key = (index >= 0) & (index < num_keys)
        k_rows = kv_ptr + tl.where(is_key, index, 0)[:, None].to(tl.int64) * stride_kv * ALIGN
        k = load_pieces(k_rows, is_key, D, D, PIECE)
        index = load_indices(entries, start + BLOCK_N, length, BLOCK_N)
        acc, m, total = attend_tile(
            q, k, k, softmax_scale * LOG2_E, is_key[None, :], acc, m, total, start < length,
            length > 0, SPLIT_SCORES,
        )  # fmt: skip

    denominator = total
    if attn_sink_ptr is not None:
        sink = tl.load(attn_sink_ptr + offs_h, mask=is_head, other=0.0)
        denominator = total + tl.exp2(sink * LOG2_E - m)
    normalizer = 1.0 / tl.where(denominator == 0.0, 1.0, denominator)
    out = scaled_pieces(acc, normalizer[:, None])
    row = i * num_heads + offs_h
    store_pieces(out_ptr + row[:, None] * VALUE_DIM, is_head, out, VALUE_DIM, D, PIECE)
    is_empty = total == 0.0
    max_logits = tl.where(total == total, m * LN_2, total)  # tl.max passes over a NaN
    max_logits = tl.where(is_empty, -float("inf"), max_logits)
    lse = tl.where(is_empty, empty_lse, (m + tl.log2(total)) * LN_2)
    tl.store(max_logits_ptr + row, max_logits, mask=is_head)
    tl.store(lse_ptr + row, lse, mask=is_head)


def sparse_prefill_triton(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    value_dim: int,
    softmax_scale: float,
    empty_lse: float,
    deterministic: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model1.ops.sparse_prefill.sparse_prefill`; `config` replaces the table's choice.

    A row's bits depend on its own valid entries alone, with `deterministic` and without: no list is
    split, and a tile without a valid entry changes nothing.
    """
    check_dtype(q)
    t, h, d = q.shape
    config = config or forward_config(device_target(q.device), h, d, q.element_size())
    out = torch.empty(t, h, value_dim, dtype=q.dtype, device=q.device)
    max_logits = torch.empty(t, h, dtype=torch.float32, device=q.device)
    lse = torch.empty(t, h, dtype=torch.float32, device=q.device)
    if t == 0:
        return out, max_logits, lse
    align = row_alignment(q.stride(0), q.stride(1), kv.stride(0))
    with torch.cuda.device_of(q):
        _sparse_attn_fwd_kernel[(t * -(-h // config.block_h),)](
            q, kv, topk_indices, topk_length, attn_sink, out, max_logits, lse,
            q.stride(0) // align, q.stride(1) // align, kv.stride(0) // align,
            topk_indices.stride(0),
            h, kv.shape[0], topk_indices.shape[1], softmax_scale, empty_lse,
            **_constants(config, d, value_dim, align),
            **launch_options(config.num_warps, config.num_stages),
        )  # fmt: skip
    return out, max_logits, lse


def _constants(config: Config, d: int, value_dim: int, align: int) -> dict[str, Any]:
    return {
        "D": d, "VALUE_DIM": value_dim, "ALIGN": align,
        "BLOCK_H": config.block_h, "BLOCK_N": config.block_n, "PIECE": config.piece,
        "SPLIT_SCORES": config.split_scores,
    }  # fmt: skip


def check_dtype(q: Tensor) -> None:
    """The kernels compute in at most 32 bits."""
    if q.dtype == torch.float64:
        raise BackendUnavailable("sparse_prefill/triton has no float64: use backend='ref'")


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """The forward kernel as MODEL1 and V32 launch it in bf16, with many heads and with few."""
    cases = []
    for name, d in MODELS.items():
        for h in (64, 16):
            config = forward_config(target, h, d, 2)
            constants = _constants(config, d, 512, 8)
            options = launch_options(config.num_warps, config.num_stages)
            cases.append(compile_case(f"{name} h{h}", _sparse_attn_fwd_kernel, constants, options))
    return cases


def compile_case(
    name: str, kernel: Any, constants: dict[str, Any], options: dict[str, Any]
) -> CompileCase:
    """A kernel of this operator with every optional argument, in bf16."""
    types = {n: "constexpr" if n in constants else _TYPES.get(n, "i32") for n in kernel.arg_names}
    return CompileCase(name, kernel, types, constants, **options)
