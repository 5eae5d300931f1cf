"""Sparse attention in Triton: the operators it consists of, and what joins them.

`lowrank_topk` reads the low-rank vectors once for few heads, else twice, `lowrank_remainder` once,
`sparse_decode` the core's tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache import KVLayout
from model1.ops.kv_cache.portable import next_power_of_2
from model1.ops.launch import launch_options
from model1.ops.lowrank_attention.portable_kernel import (
    _lowrank_merge_kernel,
    _lowrank_queries_kernel,
    _lowrank_slots_kernel,
)
from model1.ops.lowrank_remainder.portable import lowrank_remainder_triton
from model1.ops.selector.portable import lowrank_topk_triton
from model1.ops.sparse_decode.portable import sparse_decode_triton

_BLOCK_M = 16  # rows of a product: few, as there are few rows at decode
_WARPS = 4
_STAGES = 2
_SLOTS = 1024  # positions of a row that are looked up at once


@torch.no_grad()
def lowrank_attention_triton(
    q: Tensor, kv_cache: Tensor, index_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, key_end: Tensor, core_count: Tensor, basis: Tensor, mean: Tensor, *,
    topk: int, sliding_window: int, max_seqlen: int, rotary_value: bool, layout: KVLayout,
    block_size: int, value_dim: int, softmax_scale: float, attn_sink: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.lowrank_attention.lowrank_attention`."""
    basis, mean = basis.to(q.dtype).contiguous(), mean.to(q.dtype).contiguous()
    scan_q, offset = scan_queries(q, basis, mean, softmax_scale)
    scan = (scan_q, index_cache, kv_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end)
    sizes = {"max_seqlen": max_seqlen, "layout": layout, "block_size": block_size}
    chosen, _ = lowrank_topk_triton(
        *scan, core_count, topk=topk, sliding_window=sliding_window, deterministic=deterministic,
        **sizes,
    )  # fmt: skip
    core, core_lse = sparse_decode_triton(
        q[:, None], kv_cache, _slots(chosen, block_table, cu_seqlens_q, block_size)[:, None],
        topk_length=None, extra_kv_cache=None, extra_topk_indices=None, extra_topk_length=None,
        attn_sink=None, layout=layout, block_size=block_size, extra_block_size=1,
        value_dim=value_dim, softmax_scale=softmax_scale, empty_lse=-math.inf,
        deterministic=deterministic, out_dtype=torch.float32,
    )  # fmt: skip
    rest, rest_lse = lowrank_remainder_triton(
        *scan, chosen, rotary_value=rotary_value, deterministic=deterministic, **sizes
    )
    return _merge((core, core_lse), (rest, rest_lse), offset, attn_sink, basis, mean)


def scan_queries(
    q: Tensor, basis: Tensor, mean: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Scaled q [t, h, d] in the scan's coordinates, [t, h, r + d_rope], and its logit on the mean.

    basis: [r, d_nope], mean: [d_nope], contiguous, in q's dtype.
    """
    t, h, d = q.shape
    rank, d_nope = basis.shape
    scan_q = torch.empty(t, h, rank + d - d_nope, dtype=q.dtype, device=q.device)
    offset = torch.empty(t, h, dtype=torch.float32, device=q.device)
    if t:
        constants = _query_constants(h, rank, d_nope, d - d_nope)
        grid = (triton.cdiv(t * h, _BLOCK_M), triton.cdiv(rank, constants["BLOCK_R"]))
        with torch.cuda.device_of(q):
            _lowrank_queries_kernel[grid](
                q, basis, mean, scan_q, offset, t * h, q.stride(0), q.stride(1), softmax_scale,
                **constants, **launch_options(_WARPS, _STAGES),
            )  # fmt: skip
    return scan_q, offset


def _slots(positions: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, size: int) -> Tensor:
    """Slots of each row's positions, int32; -1 stays -1."""
    t, topk = positions.shape
    slots = torch.empty_like(positions)
    b, max_blocks = block_table.shape
    if 0 in (t, b):
        return slots.fill_(-1)
    constants: dict[str, Any] = {
        "BLOCK_SIZE": size, "BLOCK_B": next_power_of_2(b), "BLOCK_K": _SLOTS,
    }  # fmt: skip
    with torch.cuda.device_of(positions):
        _lowrank_slots_kernel[(t,)](
            positions, block_table, cu_seqlens_q, slots, b, max_blocks, block_table.stride(0), topk,
            **constants, **launch_options(_WARPS, 1),
        )  # fmt: skip
    return slots


def _merge(
    core: tuple[Tensor, Tensor], rest: tuple[Tensor, Tensor], offset: Tensor,
    attn_sink: Tensor | None, basis: Tensor, mean: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax over both, and its lse without the sink; the offset joins the rest's logits."""
    core_out, core_lse = (x[:, 0] for x in core)
    t, h, value_dim = core_out.shape
    out, lse = torch.empty_like(core_out, dtype=basis.dtype), torch.empty_like(offset)
    if t:
        rank, d_nope = basis.shape
        constants = _merge_constants(h, rank, d_nope, value_dim, rest[0].shape[2])
        block_c = constants["BLOCK_C"]
        tiles = triton.cdiv(d_nope, block_c) + triton.cdiv(value_dim - d_nope, block_c)
        with torch.cuda.device_of(offset):
            _lowrank_merge_kernel[(triton.cdiv(t * h, _BLOCK_M), tiles)](
                core_out, core_lse, *rest, offset, attn_sink, basis, mean, out, lse, t * h,
                **constants, **launch_options(_WARPS, _STAGES),
            )  # fmt: skip
    return out, lse


def _query_constants(h: int, rank: int, d_nope: int, d_rope: int) -> dict[str, int]:
    return {
        "H": h, "R": rank, "D_NOPE": d_nope, "D_ROPE": d_rope, "BLOCK_M": _BLOCK_M,
        "BLOCK_R": min(64, max(16, next_power_of_2(rank))),
        "BLOCK_ROPE": next_power_of_2(max(d_rope, 1)),
    }  # fmt: skip


def _merge_constants(
    h: int, rank: int, d_nope: int, value_dim: int, rest_dim: int
) -> dict[str, int]:
    return {
        "H": h, "R": rank, "D_NOPE": d_nope, "VALUE_DIM": value_dim, "REST_DIM": rest_dim,
        "BLOCK_M": _BLOCK_M, "BLOCK_C": 64,
    }  # fmt: skip


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rank 64 of MODEL1 with rotary values, 64 heads."""
    types = {
        "position_ptr": "*i32", "table_ptr": "*i32", "cu_seqlens_q_ptr": "*i32",
        "slot_ptr": "*i32", "core_ptr": "*fp32", "core_lse_ptr": "*fp32", "rest_lse_ptr": "*fp32",
        "offset_ptr": "*fp32", "sink_ptr": "*fp32", "lse_ptr": "*fp32", "scale": "fp32",
    }  # fmt: skip
    slots = {"BLOCK_SIZE": 64, "BLOCK_B": 16, "BLOCK_K": _SLOTS}
    queries = _query_constants(64, 64, 448, 64) | {"stride_qt": 64 * 512, "stride_qh": 512}
    cases = []
    for name, kernel, constants in (
        ("lowrank_queries", _lowrank_queries_kernel, queries),
        ("lowrank_slots", _lowrank_slots_kernel, slots),
        ("lowrank_merge", _lowrank_merge_kernel, _merge_constants(64, 64, 448, 512, 128)),
    ):
        numbers = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
        cases.append(CompileCase(name, kernel, numbers | types, constants, _WARPS, _STAGES))
    return cases
