"""Paged decode in Triton, for any GPU: the launches and the list of kernels.

Two launches: the main kernel, then the combine kernel unless every part is a whole request.
Nothing waits for the device, and whatever the host decides follows from shapes, so that both can
be captured in a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.ops.channel_pieces import channel_pieces
from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache.layout import KVLayout
from model1.ops.launch import (
    device_target,
    launch_options,
    max_channels,
    num_sms,
)
from model1.ops.paged_decode.portable_combine import _flash_fwd_mla_combine_kernel
from model1.ops.paged_decode.portable_kernel import _flash_fwd_splitkv_mla_kernel
from model1.ops.paged_decode.portable_sizes import (
    Config,
    Problem,
    Schedule,
    choose_config,
    choose_schedule,
)

_COMBINE_WARPS = 4
_FORMS = {"whole": 0, "balanced": 1, "fixed": 2}  # as `portable_schedule` numbers them
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def paged_decode_triton(
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
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.paged_decode.paged_decode`. fp32 queries multiply in IEEE fp32, slowly.

    Takes scratch memory of at most 8 * BLOCK_M * value_dim bytes for each program that the GPU runs
    at a time; with deterministic of 4 * rows of q * value_dim bytes for every
    `Config.deterministic_part_keys` tokens that the table is wide.
    """
    out = torch.empty(*q.shape[:-1], value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if q.numel() == 0 or len(block_table) == 0:
        return out, lse
    kv_cache, layout = _without_plain_layout(kv_cache, layout, block_size)
    problem = _problem(
        q, kv_cache, block_table, layout=layout, block_size=block_size, value_dim=value_dim,
        s_q=None if cu_seqlens_q is None else max_seqlen_q, softmax_scale=softmax_scale,
        causal=causal, empty_lse=empty_lse, deterministic=deterministic,
    )  # fmt: skip
    config = config or choose_config(device_target(q.device), problem)
    schedule = choose_schedule(config, problem, num_sms(q.device))
    shared = {
        "cache_seqlens_ptr": cache_seqlens, "cu_seqlens_q_ptr": cu_seqlens_q,
        "attn_sink_ptr": attn_sink, "out_ptr": out, "lse_ptr": lse,
        **_partial_results(problem, config, schedule, q.device), **_sizes(problem, schedule),
    }  # fmt: skip
    with torch.cuda.device_of(q):
        _launch_parts(problem, config, schedule, q, kv_cache, block_table, shared)
        if schedule.form == "balanced" or schedule.max_chunks > 1:
            _launch_combine(problem, config, schedule, shared)
    return out, lse


def _problem(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, *, layout: KVLayout | None, block_size: int,
    s_q: int | None, **options: Any,
) -> Problem:  # fmt: skip
    """The shapes of a call; s_q: the most queries of a request if they differ."""
    hkv = kv_cache.shape[2] if layout is None else 1
    return Problem(
        layout=layout, dtype=q.dtype, d=q.shape[-1], group=q.shape[-2] // hkv, hkv=hkv,
        block_size=block_size, b=len(block_table), s_q=q.shape[1] if s_q is None else s_q,
        max_seqlen=block_table.shape[1] * block_size, is_ragged=s_q is not None,
        stored=q.dtype if layout is not None else kv_cache.dtype, **options,
    )  # fmt: skip


def _launch_parts(
    problem: Problem, config: Config, schedule: Schedule, q: Tensor, kv_cache: Tensor,
    block_table: Tensor, shared: dict[str, Any],
) -> None:  # fmt: skip
    programs = schedule.num_parts * problem.hkv * schedule.row_tiles
    _flash_fwd_splitkv_mla_kernel[(programs,)](
        q_ptr=q, block_table_ptr=block_table, stride_table=block_table.stride(0),
        softmax_scale=problem.softmax_scale,
        **_query_strides(q), **_cache_arguments(kv_cache, problem), **shared,
        **_main_constants(problem, config, schedule.form, device_target(q.device)),
        **launch_options(config.num_warps, config.num_stages),
    )  # fmt: skip


def _launch_combine(
    problem: Problem, config: Config, schedule: Schedule, shared: dict[str, Any]
) -> None:
    candidates = min(problem.b, schedule.num_parts)
    constants = _combine_constants(problem, config, schedule.form, schedule.num_parts)
    rows = candidates * problem.hkv * schedule.row_tiles * config.block_m
    programs = rows * triton.cdiv(problem.value_dim, constants["BLOCK_C"])
    _flash_fwd_mla_combine_kernel[(programs,)](
        **shared, **constants, **launch_options(_COMBINE_WARPS, 1)
    )


def _sizes(problem: Problem, schedule: Schedule) -> dict[str, Any]:
    """The numbers that both kernels take."""
    return {
        "row_tiles": schedule.row_tiles, "b": problem.b, "s_q": problem.s_q,
        "max_seqlen": problem.max_seqlen, "num_parts": schedule.num_parts,
        "part_tiles": schedule.part_tiles, "max_chunks": schedule.max_chunks,
        "empty_lse": problem.empty_lse,
    }  # fmt: skip


def _partial_results(
    problem: Problem, config: Config, schedule: Schedule, device: torch.device
) -> dict[str, Tensor | None]:
    """Space for the normalised output and the base-2 log-sum-exp of every slot and row."""
    if schedule.num_slots == 0:
        return {"partial_out_ptr": None, "partial_lse_ptr": None}
    rows = (schedule.num_slots, problem.hkv * schedule.row_tiles * config.block_m)
    out = torch.empty(*rows, problem.value_dim, dtype=torch.float32, device=device)
    lse = torch.empty(rows, dtype=torch.float32, device=device)
    return {"partial_out_ptr": out, "partial_lse_ptr": lse}


def _without_plain_layout(
    kv_cache: Tensor, layout: KVLayout | None, block_size: int
) -> tuple[Tensor, KVLayout | None]:
    """A cache with a plain layout as [num_blocks, block_size, 1, d]; others as they are."""
    if layout is None or layout.is_fp8:
        return kv_cache, layout
    used = kv_cache[:, : layout.block_bytes(block_size)].view(_PLAIN_DTYPES[layout.name])
    return used.unflatten(1, (block_size, 1, layout.d)), None


def _query_strides(q: Tensor) -> dict[str, int]:
    """Elements between requests, queries and heads; a flat list of queries has no first."""
    stride_qb = 0 if q.dim() == 3 else q.stride(0)
    return {"stride_qb": stride_qb, "stride_qs": q.stride(-3), "stride_qh": q.stride(-2)}


def _cache_arguments(kv_cache: Tensor, problem: Problem) -> dict[str, Any]:
    """The keys with their strides; of an 8-bit cache also the first token's rope and scales."""
    layout, block_size, stride_block = problem.layout, problem.block_size, kv_cache.stride(0)
    rope = scales = None
    stride_row, stride_head = (0, 0) if layout else (kv_cache.stride(1), kv_cache.stride(2))
    if layout is not None:
        stride_row = layout.row_bytes
        block = kv_cache[:, : layout.block_bytes(block_size)]
        rope = block[:, layout.rope_start_bytes :].view(torch.bfloat16)
        if layout.name == "v32_fp8":
            scales = block[:, layout.d_nope :].view(torch.float32)
        else:
            scales = block[:, layout.scale_plane_start_bytes(block_size) :].view(torch.int32)
    return {
        "kv_ptr": kv_cache, "rope_ptr": rope, "scale_ptr": scales, "stride_block": stride_block,
        "stride_head": stride_head, "STRIDE_ROW": stride_row,
    }  # fmt: skip


def _main_constants(
    problem: Problem, config: Config, form: str, target: KernelTarget
) -> dict[str, Any]:
    layout = problem.layout
    d_nope = problem.d if layout is None else layout.d_nope
    pieces = channel_pieces(0, d_nope, config.channels)
    pieces += channel_pieces(d_nope, problem.d, config.channels)
    return {
        "D_NOPE": d_nope,
        "BLOCK_SIZE": problem.block_size,
        "TILE": 1 if layout is None else layout.tile,
        "STRIDE_ROPE_ROW": 0 if layout is None else layout.row_bytes // 2,
        "STRIDE_SCALE_ROW": 0
        if layout is None
        else (layout.scale_row_bytes or layout.row_bytes) // 4,
        "PIECES": pieces,
        "NUM_VALUE_PIECES": sum(start < problem.value_dim for start, _, _ in pieces),
        "CAUSAL": problem.causal,
        "HAS_FP8": target.has_fp8,
        "COMPUTE": _TYPES[problem.dtype],
        "SPLIT_SCORES": config.split_scores,
        "IS_TIGHT": config.is_tight,
        **_shared_constants(problem, config, form),
    }


def _shared_constants(problem: Problem, config: Config, form: str) -> dict[str, Any]:
    return {
        "GROUP": problem.group,
        "HKV": problem.hkv,
        "VALUE_DIM": problem.value_dim,
        "SCHEDULE": _FORMS[form],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_B": max(16, triton.next_power_of_2(problem.b)) if form == "balanced" else 1,
    }


def _combine_constants(
    problem: Problem, config: Config, form: str, num_parts: int
) -> dict[str, Any]:
    """A program merges all of a row from few parts, or some of its channels from many.

    Fixed parts are merged in one order, however many chunks the table has room for.
    """
    wide = triton.next_power_of_2(problem.value_dim)
    has_many = form == "balanced" and num_parts > 8 * problem.b
    parts, channels = (32, min(128, wide)) if has_many else (8, wide)
    return {
        "BY_PART": problem.b > num_parts, "BLOCK_S": parts, "BLOCK_C": channels,
        **_shared_constants(problem, config, form),
    }  # fmt: skip


_MODEL1, _V32 = KVLayout("model1_fp8", 448, 64), KVLayout("v32_fp8", 512, 64)
_ENGINE = {"causal": True, "is_ragged": True}
# Query heads, queries, parts and what is not plain: bf16, no mask, as many queries each, no sink.
_LAUNCHES: tuple[tuple[int, int, str, dict[str, Any]], ...] = (
    (16, 1, "balanced", {}),
    (16, 1, "balanced", _ENGINE),
    (16, 2, "balanced", {"causal": True}),
    (16, 2, "whole", _ENGINE),
    (128, 1, "balanced", {}),
    (128, 2, "balanced", {"causal": True}),
    (128, 1, "fixed", {"causal": True}),
    (128, 2, "whole", {"causal": True}),
    (128, 1, "whole", _ENGINE),
    (128, 2, "balanced", {"causal": True, "dtype": torch.float16}),
)
_PLAIN_LAUNCHES: tuple[tuple[int, int, str, dict[str, Any]], ...] = (
    (16, 1, "fixed", {}),
    (16, 1, "whole", {}),
    (16, 2, "balanced", {"causal": True, "dtype": torch.float16}),
    (32, 1, "balanced", {}),
    (32, 1, "fixed", {}),
    (128, 1, "fixed", {}),
    (128, 1, "whole", {}),
)
_WIDE_LAUNCHES: tuple[tuple[int, int, str, dict[str, Any]], ...] = (
    (16, 2, "balanced", {"causal": True}),
)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Blocks of 64 tokens, in bf16 and in both FP8 forms, read by 16, 32 and 128 heads.

    As FlashMLA's interface and as the engine launch them (ragged, with a sink and a causal mask).
    The widest rows that MODEL1 has and the target takes are read by 16 heads with two queries.
    """
    cases = []
    widest = max_channels(target, torch.bfloat16)
    for layout, d in (
        (None, 512), (None, 576), (_MODEL1, 512), (_V32, 576),
        (KVLayout("model1_fp8", widest - 64, 64), widest),
    ):  # fmt: skip
        launches = _LAUNCHES + (_PLAIN_LAUNCHES if layout is None else ())
        for h, s_q, form, special in launches if d < widest else _WIDE_LAUNCHES:
            options = {"dtype": torch.bfloat16, "causal": False} | special
            problem = Problem(
                layout=layout, d=d, value_dim=512 if d < widest else d, group=h, hkv=1,
                block_size=64, b=128, s_q=s_q, max_seqlen=1, softmax_scale=1.0, empty_lse=0.0,
                deterministic=form == "fixed", stored=options["dtype"], **options,
            )  # fmt: skip
            config = choose_config(target, problem)
            cases.append(_main_case(problem, config, target, form))
            if layout is None and form == "balanced" and not special:
                cases.append(_combine_case(problem, config, form))
    return cases


_SIGNATURE = {
    "rope_ptr": "*bf16", "block_table_ptr": "*i32", "cache_seqlens_ptr": "*i32",
    "stride_table": "i32", "row_tiles": "i32", "softmax_scale": "fp32", "b": "i32", "s_q": "i32",
    "max_seqlen": "i32", "num_parts": "i32", "part_tiles": "i32", "max_chunks": "i32",
    "empty_lse": "fp32", "partial_out_ptr": "*fp32", "partial_lse_ptr": "*fp32",
    "lse_ptr": "*fp32", "cu_seqlens_q_ptr": "*i32", "attn_sink_ptr": "*fp32",
}  # fmt: skip
_TYPE_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def _name(problem: Problem) -> str:
    """What tells the launches apart but for their parts."""
    words = [problem.layout.name if problem.layout else _TYPE_NAMES[problem.stored][1:]]
    words += [str(problem.d), f"h{problem.group}"]
    if problem.layout and problem.dtype == torch.float16:
        words.append("fp16")
    words += ["causal"] * problem.causal + ["ragged sink"] * problem.is_ragged
    return " ".join(words)


def _case_signature(problem: Problem) -> tuple[dict[str, str], dict[str, None]]:
    """The types of the pointers that are there, and those that are not."""
    types = dict.fromkeys(("q_ptr", "out_ptr"), _TYPE_NAMES[problem.dtype])
    absent = {} if problem.is_ragged else {"cu_seqlens_q_ptr": None, "attn_sink_ptr": None}
    return _SIGNATURE | types, absent


def _main_case(problem: Problem, config: Config, target: KernelTarget, form: str) -> CompileCase:
    layout, d = problem.layout, problem.d
    stride_row = d if layout is None else layout.row_bytes
    # The launcher compiles for strides that are multiples of 16, which a signature cannot say.
    strides = {
        "stride_qb": problem.group * d, "stride_qs": problem.group * d, "stride_qh": d,
        "stride_block": problem.block_size * stride_row, "stride_head": stride_row,
        "STRIDE_ROW": stride_row,
    }  # fmt: skip
    signature, absent = _case_signature(problem)
    absent |= {"rope_ptr": None, "scale_ptr": None} if layout is None else {}
    if form == "whole":
        absent |= {"partial_out_ptr": None, "partial_lse_ptr": None}
    scale = "*fp32" if layout is not None and layout.name == "v32_fp8" else "*i32"
    kv = _TYPE_NAMES[problem.stored] if layout is None else "*u8"
    return CompileCase(
        name=f"flash_fwd_splitkv_mla {_name(problem)} {form}",
        kernel=_flash_fwd_splitkv_mla_kernel,
        signature=signature | {"kv_ptr": kv, "scale_ptr": scale},
        constexprs=_main_constants(problem, config, form, target) | strides | absent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _combine_case(problem: Problem, config: Config, form: str) -> CompileCase:
    signature, absent = _case_signature(problem)
    return CompileCase(
        name=f"flash_fwd_mla_combine {_name(problem)}",
        kernel=_flash_fwd_mla_combine_kernel,
        signature=signature,
        constexprs=_combine_constants(problem, config, form, 1) | absent,
        num_warps=_COMBINE_WARPS,
        num_stages=1,
    )
