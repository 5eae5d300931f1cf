"""The lightning indexer of DeepSeek-V3.2: contract of `lightning_topk`."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.selector.checks import check_choice, check_device, check_rows

LIGHTNING_TOPK = Operator(
    name="lightning_topk",
    implementations={
        "ref": "model1.ops.selector.ref:lightning_topk_ref",
        "triton": "model1.ops.selector.portable_lightning:lightning_topk_triton",
    },
)


def lightning_topk(
    q: Tensor,
    weights: Tensor,
    index_cache: Tensor,
    index_scale: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    key_end: Tensor,
    *,
    topk: int,
    max_seqlen: int,
    block_size: int,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Positions of the tokens with the largest index scores among those that a row sees.

    I_j = index_scale[j] sum_h weights[i, h] ReLU(q[i, h] . k_j),  0 <= j < key_end[i]

    q: [t, h, d] float8_e4m3fn, any strides with a contiguous last axis, its scale multiplied into
    weights [t, h] fp32. index_cache: [num_slots, d] uint8, e4m3 codes of k, index_scale:
    [num_slots] fp32. block_table, cu_seqlens_q, max_seqlen_q, key_end, max_seqlen: as
    `lowrank_topk` takes them.

    Returns [t, topk] int32, -1 behind the last; a row that sees fewer than topk gets them all.
    Positions that no row of the request sees may hold anything. Products of e4m3 numbers are exact
    and summed in fp32; backends may differ where scores are equal but for rounding. deterministic:
    a row's results do not depend on its batch mates, on max_seqlen_q and on the table's width.
    Scratch memory: 12 bytes per row and position, in chunks of rows under 256 MiB (or one row). Not
    differentiable. Raises ValueError and BackendUnavailable as `lowrank_topk` does.
    Source: DeepSeek-V3.2, section 2.1.
    """
    if q.dim() != 3 or 0 in q.shape[1:] or q.dtype != torch.float8_e4m3fn or q.stride(-1) != 1:
        got = f"{list(q.shape)} {q.dtype} with strides {q.stride()}"
        raise ValueError(f"q must be [t, h, d] float8_e4m3fn, contiguous along d, got {got}")
    num_slots = len(index_cache)
    for name, tensor, shape, dtype in (
        ("weights", weights, q.shape[:2], torch.float32),
        ("index_cache", index_cache, (num_slots, q.shape[2]), torch.uint8),
        ("index_scale", index_scale, (num_slots,), torch.float32),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            got = f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name} must be contiguous {list(shape)} {dtype}, got {got}")
        check_device(name, tensor, q)
    check_rows(q, block_table, cu_seqlens_q, max_seqlen_q, key_end, max_seqlen, block_size)
    check_choice(topk, 0)
    if deterministic:  # a batch of single queries would get sizes of its own, and other sums
        max_seqlen_q = max(2, max_seqlen_q)
    return torch.ops.model1.lightning_topk(
        q, weights, index_cache, index_scale, block_table, cu_seqlens_q, max_seqlen_q, key_end,
        topk, max_seqlen, block_size, LIGHTNING_TOPK.resolve(backend, q.device),
    )  # fmt: skip


@torch.library.custom_op("model1::lightning_topk", mutates_args=())
def _lightning_topk(
    q: Tensor, weights: Tensor, index_cache: Tensor, index_scale: Tensor, block_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, key_end: Tensor, topk: int, max_seqlen: int,
    block_size: int, backend: str,
) -> Tensor:  # fmt: skip
    return LIGHTNING_TOPK.load(backend)(
        q, weights, index_cache, index_scale, block_table, cu_seqlens_q, max_seqlen_q, key_end,
        topk=topk, max_seqlen=max_seqlen, block_size=block_size,
    )  # fmt: skip


@_lightning_topk.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    topk = args[7]
    assert isinstance(topk, int)
    return q.new_empty(len(q), topk, dtype=torch.int32)
