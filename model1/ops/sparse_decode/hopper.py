"""Sparse decode over MODEL1, V3.2 and bf16 caches on Hopper: sizes, schedules and launches.

The host decides from shapes alone and never waits: a CUDA graph of the launches may be replayed
with other slots and lengths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.hopper.combine import _flash_fwd_mla_combine_kernel
from model1.ops.hopper.launch import (
    BF16,
    BF16_OPTIONS,
    CHANNELS,
    COMBINE_WARPS,
    FP8,
    FP8_OPTIONS,
    HEADS,
    OVERLAPS,
    SPILL_LIMIT_BYTES,
    addressing,
    body_sizes,
    check_start,
    compile_case,
    few_cases,
    launch_merge,
    merge_sizes,
    partial_results,
    tensor_map,
)
from model1.ops.hopper.overlap import OVERLAP
from model1.ops.hopper.schedule import (
    Lists,
    Split,
    _split_items_kernel,
    _whole_items_kernel,
    split_items,
    whole_items,
)
from model1.ops.kv_cache import KVLayout
from model1.ops.launch import launch_options, num_sms
from model1.ops.sparse_decode.hopper_kernel import _flash_fwd_splitkv_mla_fp8_sparse_kernel
from model1.ops.sparse_decode.portable import Scope, without_padding

# In pairs of blocks: what partial results and their merge cost, guessed from measured calls.
_MERGE_COST = 1.5


def choose_rounds(rows: int, pairs: int, num_programs: int) -> int | None:
    """Whole rows of `pairs` pairs for each program before the rest is split; None: split none."""
    all_rounds, rounds = -(-rows // num_programs), rows // num_programs
    rest = (rows - rounds * num_programs) * pairs
    split_cost = rounds * pairs + -(-rest // num_programs) + _MERGE_COST
    return None if all_rounds * pairs <= split_cost else rounds


def sparse_decode_hopper(
    q: Tensor,
    kv_cache: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_topk_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    attn_sink: Tensor | None,
    layout: KVLayout,
    block_size: int,
    extra_block_size: int,
    value_dim: int,
    softmax_scale: float,
    empty_lse: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.sparse_decode.sparse_decode`; for calls that `choice` does not refuse, with
    caches that start at multiples of 16 bytes.

    Where rows are split it takes scratch memory of 257 KiB per SM. Queries whose strides or start
    a tensor map cannot describe are copied first. deterministic: no row is split.
    """
    b, s_q, h, _ = q.shape
    out = torch.empty(b, s_q, h, CHANNELS, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, s_q, h, dtype=torch.float32, device=q.device)
    if b > 0:
        main = Scope(kv_cache, topk_indices, topk_length, block_size)
        extra = Scope(extra_kv_cache, extra_topk_indices, extra_topk_length, extra_block_size)
        for cache in (kv_cache, kv_cache if extra_kv_cache is None else extra_kv_cache):
            check_start("sparse_decode", cache)
        scale_log2 = softmax_scale * math.log2(math.e)
        with torch.cuda.device_of(q):
            _launch(
                q, main, extra, attn_sink, out, lse, scale_log2, empty_lse, deterministic,
                has_rope=layout.d > CHANNELS, is_bf16=layout.name == "bf16",
            )  # fmt: skip
    return out, lse


def _launch(
    q: Tensor, main: Scope, extra: Scope, attn_sink: Tensor | None, out: Tensor, lse: Tensor,
    scale_log2: float, empty_lse: float, deterministic: bool, *, has_rope: bool,
    is_bf16: bool,
) -> None:  # fmt: skip
    b, s_q, h, _ = q.shape
    sizes = body_sizes(is_bf16, h)
    heads = sizes["COLUMNS"] or HEADS
    groups = -(-h // heads)
    num_programs = max(1, num_sms(q.device) // groups)
    plan = _plan(main, extra, b, s_q, num_programs, deterministic)
    items = plan.items if isinstance(plan, Split) else plan
    item_stride = 0 if items is None else items.stride(0)
    topk, extra_topk = main.topk, extra.topk
    partial, partial_lse = partial_results(plan, num_programs * groups, out, lse)
    if extra.kv_cache is None:
        extra = main  # whose lists no item then names as the second
    _flash_fwd_splitkv_mla_fp8_sparse_kernel[(num_programs * groups,)](
        tensor_map(q, 256, heads), tensor_map(q, 64, heads) if has_rope else None,
        tensor_map(out, 256, heads), lse, partial, partial_lse, attn_sink, items,
        item_stride, main.slots, *main.slot_strides, extra.slots, *extra.slot_strides,
        main.kv_cache, *addressing(*main.addressing), extra.kv_cache,
        *addressing(*extra.addressing), h, s_q, groups, b * s_q, topk, extra_topk, scale_log2,
        empty_lse, 0,
        **sizes, **(BF16_OPTIONS if is_bf16 else FP8_OPTIONS),
        **(OVERLAP if items is not None else {}),
    )  # fmt: skip
    launch_merge(
        plan, out, lse, partial, partial_lse, attn_sink, b * s_q, h, groups, num_programs, empty_lse
    )


def _plan(
    main: Scope, extra: Scope, b: int, s_q: int, num_programs: int, deterministic: bool
) -> Tensor | Split | None:
    """Whole rows only, or some of them split; None: whole rows, all alike."""
    queries = 1
    if deterministic:
        # cut at their last valid entries, or a row's blocks would follow the batch's padding
        main, extra = without_padding(main, extra, b, s_q)
        b, s_q, queries = b * s_q, 1, s_q
    assert main.slots is not None
    lists = Lists(
        b=b, s_q=s_q, topk=main.topk, extra_topk=extra.topk, length=main.length,
        extra_length=extra.length, device=main.slots.device, queries=queries,
    )  # fmt: skip
    if deterministic:
        return whole_items(lists, num_programs)
    if lists.has_length:
        # rows half as long as they may be: the longest of many is no worse than a merge
        is_whole = 5 * lists.rows >= 4 * num_programs
        return whole_items(lists, num_programs) if is_whole else split_items(lists, num_programs, 0)
    rounds = choose_rounds(lists.rows, lists.max_pairs, num_programs)
    return None if rounds is None else split_items(lists, num_programs, rounds)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Attention with and without a sink, the merge and both schedules, on Hopper alone."""
    if target != KernelTarget("cuda", 90):
        return []
    kernel, merge = _flash_fwd_splitkv_mla_fp8_sparse_kernel, _flash_fwd_mla_combine_kernel
    main = {**launch_options(4, 1), "max_registers": FP8_OPTIONS["maxnreg"]}
    main["spill_limit_bytes"] = SPILL_LIMIT_BYTES
    bf16 = {**launch_options(4, 1), "max_registers": BF16_OPTIONS["maxnreg"]}
    small = launch_options(COMBINE_WARPS, 1)
    model1 = FP8 | {"rope_desc": None}
    sizes = OVERLAPS | {"BLOCK_G": 256}
    few, many = merge_sizes(False), merge_sizes(True)
    split = OVERLAPS | {"BLOCK_R": 256, "length_ptr": None, "extra_length_ptr": None}
    return [
        compile_case("sparse_decode MODEL1 sink", kernel, model1, main),
        compile_case("sparse_decode MODEL1", kernel, model1 | {"sink_ptr": None}, main),
        compile_case("sparse_decode MODEL1 even", kernel, model1 | {"items_ptr": None}, main),
        compile_case("sparse_decode V32", kernel, FP8, main),
        compile_case("sparse_decode V32 even", kernel, FP8 | {"items_ptr": None}, main),
        compile_case("sparse_decode bf16 512", kernel, BF16 | {"rope_desc": None}, bf16),
        compile_case("sparse_decode bf16 576", kernel, BF16, bf16),
        *few_cases("sparse_decode MODEL1", kernel, False, {"rope_desc": None}),
        *few_cases(
            "sparse_decode MODEL1 even", kernel, False, {"rope_desc": None, "items_ptr": None}
        ),
        *few_cases("sparse_decode V32", kernel, False, {}),
        *few_cases("sparse_decode bf16 512", kernel, True, {"rope_desc": None}),
        *few_cases("sparse_decode bf16 576", kernel, True, {}),
        compile_case("combine", merge, sizes | few, small),
        compile_case("combine of many", merge, sizes | many, small),
        compile_case("whole items", _whole_items_kernel, sizes | {"IS_SORTED": True}, small),
        compile_case("split items", _split_items_kernel, split, small),
    ]
