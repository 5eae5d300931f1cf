"""Selectors of token-level sparse attention over paged caches: which tokens a row attends exactly.

`lowrank_topk` is this library's own, a scan of r projected channels that the remainder shares;
`lightning_topk` (in `lightning.py`) is DeepSeek-V3.2's indexer. Neither holds more than a bounded
part of the scores at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.kv_cache import KVLayout
from model1.ops.selector.checks import (
    check_choice,
    check_index_cache,
    check_query,
    check_rows,
    check_vector,
)
from model1.ops.selector.lightning import lightning_topk

__all__ = ["LOWRANK_TOPK", "lightning_topk", "lowrank_topk"]

LOWRANK_TOPK = Operator(
    name="lowrank_topk",
    implementations={
        "ref": "model1.ops.selector.ref:lowrank_topk_ref",
        "triton": "model1.ops.selector.portable:lowrank_topk_triton",
    },
)


def lowrank_topk(
    scan_q: Tensor,
    index_cache: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    key_end: Tensor,
    core_count: Tensor,
    *,
    topk: int,
    sliding_window: int,
    max_seqlen: int,
    layout: KVLayout,
    block_size: int,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The core of every row: its last visible tokens, then those that heads find most probable.

    s_hj = scan_q[i, h] . [z_j, k_rope_j],  lse_h = ln sum_j e^(s_hj)
    vote_j = sum_h e^(s_hj - lse_h)

    over positions 0 <= j < key_end[i]. Chosen are the last `sliding_window` of them, then those
    with the largest votes, until there are core_count[i], or all of them.

    scan_q: [t, h, r + d_rope] bf16, fp16 or fp32, the softmax scale included; any strides with a
    contiguous last axis. index_cache: [num_slots, r] bf16 or fp32, z of each slot; kv_cache: uint8
    blocks of `layout`, whose rotary channels are read. block_table: [b, max_blocks] int32. Rows
    cu_seqlens_q[i] .. cu_seqlens_q[i + 1] (int32, from 0 to t, at most max_seqlen_q each) belong to
    request i. key_end: [t] int32, at most max_seqlen. core_count: [t] int32, at most topk, and at
    least the row's visible part of the window. Rows that no request owns: undefined results, no
    access outside the arguments if their key_end is at most max_seqlen.

    Returns positions in the request, [t, topk] int32, distinct, with -1 behind them, and lse [t, h]
    fp32, -inf for a row with key_end <= 0. Positions that no row of the request sees may hold
    anything, NaN included. Backends may differ where votes are equal but for rounding.
    deterministic: a row's results do not depend on its batch mates. Scratch memory: 12 bytes per
    row and position, 4 per row, head and split, 2 KiB per row, and for few heads 2 (fp32: 4) bytes
    per row, position and head; in chunks of rows under 256 MiB (or one row). Not differentiable.
    Raises ValueError for shapes, dtypes, devices, strides and, on the CPU, for numbers in
    cu_seqlens_q and key_end that break these rules; BackendUnavailable for a backend that cannot
    run here.
    The scan is ours, see docs/architecture.md.
    """
    check_index_cache(index_cache, kv_cache, layout, block_size, scan_q)
    check_query("scan_q", scan_q, index_cache.shape[1] + layout.d_rope)
    check_rows(scan_q, block_table, cu_seqlens_q, max_seqlen_q, key_end, max_seqlen, block_size)
    check_vector("core_count", core_count, len(scan_q), scan_q)
    check_choice(topk, sliding_window)
    return torch.ops.model1.lowrank_topk(
        scan_q, index_cache, kv_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end,
        core_count, topk, sliding_window, max_seqlen, layout.name, layout.d_nope, layout.d_rope,
        block_size, deterministic, LOWRANK_TOPK.resolve(backend, scan_q.device),
    )  # fmt: skip


@torch.library.custom_op("model1::lowrank_topk", mutates_args=())
def _lowrank_topk(
    scan_q: Tensor, index_cache: Tensor, kv_cache: Tensor, block_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, key_end: Tensor, core_count: Tensor,
    topk: int, sliding_window: int, max_seqlen: int, layout: str, d_nope: int, d_rope: int,
    block_size: int, deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return LOWRANK_TOPK.load(backend)(
        scan_q, index_cache, kv_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end,
        core_count, topk=topk, sliding_window=sliding_window, max_seqlen=max_seqlen,
        layout=KVLayout(layout, d_nope, d_rope), block_size=block_size,  # pyright: ignore
        deterministic=deterministic,
    )  # fmt: skip


@_lowrank_topk.register_fake
def _(scan_q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    topk = args[7]
    assert isinstance(topk, int)
    indices = scan_q.new_empty(len(scan_q), topk, dtype=torch.int32)
    return indices, scan_q.new_empty(scan_q.shape[:2], dtype=torch.float32)
