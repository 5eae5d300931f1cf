"""What `lowrank_attention` accepts; the implementations trust it."""

from __future__ import annotations

from torch import Tensor, float32

from model1.ops.kv_cache import KVLayout
from model1.ops.selector.checks import (
    check_choice,
    check_device,
    check_index_cache,
    check_query,
    check_rows,
    check_vector,
)


def check_arguments(
    q: Tensor, kv_cache: Tensor, index_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, key_end: Tensor, core_count: Tensor, basis: Tensor, mean: Tensor,
    attn_sink: Tensor | None, *, topk: int, sliding_window: int, max_seqlen: int, value_dim: int,
    rotary_value: bool, layout: KVLayout, block_size: int,
) -> None:  # fmt: skip
    """Raise ValueError that names the argument and the rule it breaks."""
    check_query("q", q, layout.d)
    check_index_cache(index_cache, kv_cache, layout, block_size, q)
    check_rows(q, block_table, cu_seqlens_q, max_seqlen_q, key_end, max_seqlen, block_size)
    check_vector("core_count", core_count, len(q), q)
    check_choice(topk, sliding_window)
    want = (index_cache.shape[1], layout.d_nope)
    for name, tensor, shape in (("basis", basis, want), ("mean", mean, want[1:])):
        if tensor.shape != shape or not tensor.is_floating_point():
            got = f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name} must be {list(shape)} floating point, got {got}")
        check_device(name, tensor, q)
    values = layout.d if rotary_value else layout.d_nope
    if value_dim != values:
        raise ValueError(f"value_dim must be {values}, got {value_dim}")
    if attn_sink is None:
        return
    if attn_sink.shape != q.shape[1:2] or attn_sink.dtype != float32:
        got = f"{list(attn_sink.shape)} {attn_sink.dtype}"
        raise ValueError(f"attn_sink must be [{q.shape[1]}] float32, got {got}")
    if not attn_sink.is_contiguous():
        raise ValueError(f"attn_sink must be contiguous, got stride {attn_sink.stride(0)}")
    check_device("attn_sink", attn_sink, q)
