"""Paged decode on Hopper: sizes, schedules and launches.

The host decides from shapes alone and never waits: a CUDA graph of the launches may be replayed
with other tables and lengths.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.hopper.launch import (
    ALIGNMENT_BYTES,
    BF16,
    BF16_OPTIONS,
    CHANNELS,
    FP8,
    FP8_OPTIONS,
    HEADS,
    SPILL_LIMIT_BYTES,
    addressing,
    body_sizes,
    check_start,
    compile_case,
    few_cases,
    launch_merge,
    partial_results,
    tensor_map,
)
from model1.ops.hopper.overlap import OVERLAP
from model1.ops.hopper.schedule import Lists, Split, split_items, whole_items
from model1.ops.kv_cache.layout import KVLayout
from model1.ops.launch import fast_divisor, launch_options, num_sms
from model1.ops.paged_decode.hopper_kernel import _flash_fwd_splitkv_mla_kernel

_MAX_SPLIT_ROWS = 4096  # requests whose lengths one program adds up


def paged_decode_hopper(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    attn_sink: Tensor | None,
    layout: KVLayout | None,
    block_size: int,
    value_dim: int,
    softmax_scale: float,
    causal: bool,
    empty_lse: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.paged_decode.paged_decode`; for calls that `choice` does not refuse.

    Takes scratch memory of 257 KiB per SM, and copies queries whose strides or start a tensor map
    cannot describe. deterministic: no request is split.
    """
    b, s_q, h, d = q.shape
    out = torch.empty(b, s_q, h, CHANNELS, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, s_q, h, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    # the heads of all queries of a request are one query's
    folded, folded_out = q.reshape(b, 1, s_q * h, d), out.view(b, 1, s_q * h, CHANNELS)
    sinks = attn_sink if attn_sink is None or s_q == 1 else attn_sink.repeat(s_q)
    lists = Lists(
        b=b, s_q=1, topk=block_table.shape[1] * block_size, extra_topk=0, length=cache_seqlens,
        extra_length=None, device=q.device,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        _launch(
            folded, _cache(kv_cache, block_size), block_table, lists, sinks, folded_out, lse,
            softmax_scale * math.log2(math.e), empty_lse, deterministic, last_query=s_q - 1,
            heads_of_query=h, is_causal=causal and s_q > 1,
            is_bf16=layout is None or layout.name == "bf16",
        )  # fmt: skip
    return out, lse


def _launch(
    q: Tensor, cache: tuple[Tensor, int, int, int, int, int], block_table: Tensor, lists: Lists,
    sinks: Tensor | None, out: Tensor, lse: Tensor, scale_log2: float, empty_lse: float,
    deterministic: bool, *, last_query: int, heads_of_query: int, is_causal: bool, is_bf16: bool,
   
) -> None:  # fmt: skip
    b, _, heads, d = q.shape
    sizes = body_sizes(is_bf16, heads)
    group_heads = sizes["COLUMNS"] or HEADS
    groups = -(-heads // group_heads)
    num_programs = max(1, num_sms(q.device) // groups)
    if deterministic or b > _MAX_SPLIT_ROWS:
        plan = whole_items(lists, num_programs)
    else:
        plan = split_items(lists, num_programs, 0)
    items = plan.items if isinstance(plan, Split) else plan
    partial, partial_lse = partial_results(plan, num_programs * groups, out, lse)
    _flash_fwd_splitkv_mla_kernel[(num_programs * groups,)](
        tensor_map(q, 256, group_heads),
        tensor_map(q, 64, group_heads) if d > CHANNELS else None,
        tensor_map(out, 256, group_heads), lse, partial, partial_lse, sinks, items,
        items.stride(0), block_table, block_table.stride(0), *cache, heads, groups, b, lists.topk,
        last_query, heads_of_query, scale_log2, empty_lse, 0, IS_CAUSAL=is_causal,
        **sizes, **(BF16_OPTIONS if is_bf16 else FP8_OPTIONS), **OVERLAP,
    )  # fmt: skip
    launch_merge(
        plan, out, lse, partial, partial_lse, sinks, b, heads, groups, num_programs, empty_lse
    )


def _cache(kv_cache: Tensor, block_size: int) -> tuple[Tensor, int, int, int, int, int]:
    check_start("paged_decode", kv_cache)
    cache = kv_cache.view(torch.uint8) if kv_cache.dtype != torch.uint8 else kv_cache
    units = cache.stride(0) // ALIGNMENT_BYTES
    last_slot = min(len(cache) * block_size - 1, 2**31 - 1)
    return cache, *addressing(units, block_size, *fast_divisor(block_size), last_slot)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """bf16 and FP8 rows of 512 and 576 channels, with and without a causal mask; Hopper alone."""
    if target != KernelTarget("cuda", 90):
        return []
    cases = []
    for name, rows, options in (("bf16", BF16, BF16_OPTIONS), ("fp8", FP8, FP8_OPTIONS)):
        limits: dict[str, Any] = {**launch_options(4, 1), "max_registers": options["maxnreg"]}
        # the place in a table takes two words more than a list's
        limits["spill_limit_bytes"] = SPILL_LIMIT_BYTES + 8 if name == "fp8" else 0
        for d, special in ((512, {"rope_desc": None}), (576, {})):
            for causal in (False, True):
                constants = rows | special | {"IS_CAUSAL": causal}
                words = f"paged_decode {name} {d}" + " causal" * causal
                cases.append(compile_case(words, _flash_fwd_splitkv_mla_kernel, constants, limits))
            cases += few_cases(
                f"paged_decode {name} {d}", _flash_fwd_splitkv_mla_kernel, name == "bf16",
                special | {"IS_CAUSAL": False},
            )  # fmt: skip
    return cases
