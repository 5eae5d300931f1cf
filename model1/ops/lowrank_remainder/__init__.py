"""The rest of a sparse softmax over paged caches: all visible tokens outside the core.

Membership is looked up in a mask instead of subtracting the core's approximate terms from a sum
over all tokens: where those terms are nearly the whole sum, as a good core makes them, the
difference of two fp32 sums has no correct digit left. The error of the subtraction is about
2^-24 e^(lse_all - lse_rest) relative to the rest, unbounded in the core's share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.kv_cache import KVLayout
from model1.ops.selector.checks import check_device, check_index_cache, check_query, check_rows

LOWRANK_REMAINDER = Operator(
    name="lowrank_remainder",
    implementations={
        "ref": "model1.ops.lowrank_remainder.ref:lowrank_remainder_ref",
        "triton": "model1.ops.lowrank_remainder.portable:lowrank_remainder_triton",
    },
)


def lowrank_remainder(
    scan_q: Tensor,
    index_cache: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    key_end: Tensor,
    core_indices: Tensor,
    *,
    max_seqlen: int,
    rotary_value: bool,
    layout: KVLayout,
    block_size: int,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Low-rank attention of every row over its visible tokens that are not in its core.

    out[i, h] = sum_j e^(s_j) [z_j, k_rope_j] / sum_j e^(s_j),  s_j = scan_q . [z_j, k_rope_j]
    lse[i, h] = ln sum_j e^(s_j),  positions j < key_end[i] not in core_indices[i]

    scan_q and all that says which rows see which tokens: as `lowrank_topk` takes them.
    core_indices: [t, k] int32, distinct positions in any order; what is no position that the row
    sees, such as -1, changes nothing. The rotary channels join the value only
    with `rotary_value`. The mask of the core takes a byte per row and visible position, in chunks
    of rows that keep scratch memory under 256 MiB (or one row).

    Returns out [t, h, r] (r + d_rope with `rotary_value`) in scan_q's dtype, and lse [t, h] fp32.
    An empty rest gives out = 0, lse = -inf. Positions that no row of the request sees may hold
    anything. deterministic: a row's bits do not depend on its batch mates. Not differentiable.
    Raises ValueError and BackendUnavailable as `lowrank_topk` does.
    The formula is ours, see docs/architecture.md.
    """
    check_index_cache(index_cache, kv_cache, layout, block_size, scan_q)
    check_query("scan_q", scan_q, index_cache.shape[1] + layout.d_rope)
    check_rows(scan_q, block_table, cu_seqlens_q, max_seqlen_q, key_end, max_seqlen, block_size)
    if core_indices.dim() != 2 or len(core_indices) != len(scan_q):
        raise ValueError(f"core_indices must be [{len(scan_q)}, k], got {list(core_indices.shape)}")
    if core_indices.dtype != torch.int32:
        raise ValueError(f"core_indices must be int32, got {core_indices.dtype}")
    check_device("core_indices", core_indices, scan_q)
    return torch.ops.model1.lowrank_remainder(
        scan_q, index_cache, kv_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end,
        core_indices, max_seqlen, rotary_value, layout.name, layout.d_nope, layout.d_rope,
        block_size, deterministic, LOWRANK_REMAINDER.resolve(backend, scan_q.device),
    )  # fmt: skip


@torch.library.custom_op("model1::lowrank_remainder", mutates_args=())
def _lowrank_remainder(
    scan_q: Tensor, index_cache: Tensor, kv_cache: Tensor, block_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, key_end: Tensor, core_indices: Tensor,
    max_seqlen: int, rotary_value: bool, layout: str, d_nope: int, d_rope: int, block_size: int,
    deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return LOWRANK_REMAINDER.load(backend)(
        scan_q, index_cache, kv_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end,
        core_indices, max_seqlen=max_seqlen, rotary_value=rotary_value,
        layout=KVLayout(layout, d_nope, d_rope), block_size=block_size,  # pyright: ignore
        deterministic=deterministic,
    )  # fmt: skip


@_lowrank_remainder.register_fake
def _(scan_q: Tensor, index_cache: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    width = scan_q.shape[2] if args[7] else index_cache.shape[1]
    out = scan_q.new_empty(*scan_q.shape[:2], width)
    return out, scan_q.new_empty(scan_q.shape[:2], dtype=torch.float32)
