"""Paged decode in Triton, for any GPU: the launches and the list of kernels.

Two launches: the split kernel, then the combine kernel unless there is one split. Nothing waits
for the device, and whatever the host decides follows from shapes, so that both can be captured in
a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.ops.channel_pieces import channel_pieces
from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache.layout import KVLayout
from model1.ops.paged_decode.portable_combine import _flash_fwd_mla_combine_kernel
from model1.ops.paged_decode.portable_kernel import _flash_fwd_splitkv_mla_kernel
from model1.ops.paged_decode.portable_sizes import (
    Config,
    Cut,
    Problem,
    choose_config,
    choose_cut,
)

_COMBINE_SPLITS = 32
_COMBINE_CHANNELS = 128
_COMBINE_WARPS = 4
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

    Takes scratch memory of 4 * rows of q * value_dim * number of splits bytes; with deterministic
    that number is the width of the table over `Config.deterministic_split_keys` tokens.
    """
    out = torch.empty(*q.shape[:-1], value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if q.numel() == 0 or len(block_table) == 0:
        return out, lse
    kv_cache, layout = _without_plain_layout(kv_cache, layout, block_size)
    hkv = kv_cache.shape[2] if layout is None else 1
    problem = Problem(
        layout=layout, dtype=q.dtype, d=q.shape[-1], value_dim=value_dim,
        group=q.shape[-2] // hkv, hkv=hkv, block_size=block_size, b=len(block_table),
        s_q=q.shape[1] if cu_seqlens_q is None else max_seqlen_q,
        max_seqlen=block_table.shape[1] * block_size, softmax_scale=softmax_scale, causal=causal,
        empty_lse=empty_lse, deterministic=deterministic,
    )  # fmt: skip
    config = config or choose_config(_device(q.device)[0], problem)
    cut = choose_cut(config, problem, _device(q.device)[1])
    shared = _shared_arguments(problem, cut, cache_seqlens, cu_seqlens_q, attn_sink)
    results = _partial_results(out, lse, cut.num_splits) if cut.num_splits > 1 else (out, lse)
    with torch.cuda.device_of(q):
        _launch_splits(problem, config, cut, q, kv_cache, block_table, results, shared)
        if cut.num_splits > 1:
            _launch_combine(problem, config, results, (out, lse), shared)
    return out, lse


def _launch_splits(
    problem: Problem, config: Config, cut: Cut, q: Tensor, kv_cache: Tensor, block_table: Tensor,
    results: tuple[Tensor, Tensor], shared: dict[str, Any],
) -> None:  # fmt: skip
    programs = problem.b * problem.hkv * cut.row_tiles * cut.num_splits
    target = _device(q.device)[0]
    _flash_fwd_splitkv_mla_kernel[(programs,)](
        q_ptr=q, block_table_ptr=block_table, out_ptr=results[0], lse_ptr=results[1],
        stride_table=block_table.stride(0), row_tiles=cut.row_tiles,
        softmax_scale=problem.softmax_scale,
        **_query_strides(q), **_cache_arguments(kv_cache, problem), **shared,
        **_split_constants(problem, config, target, is_split=cut.num_splits > 1),
        **_options(config.num_warps, config.num_stages),
    )  # fmt: skip


def _launch_combine(
    problem: Problem, config: Config, partial: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor], shared: dict[str, Any],
) -> None:  # fmt: skip
    constants = _combine_constants(problem, config)
    rows = problem.b * problem.s_q * problem.group * problem.hkv
    programs = rows * triton.cdiv(problem.value_dim, constants["BLOCK_C"])
    _flash_fwd_mla_combine_kernel[(programs,)](
        partial_out_ptr=partial[0], partial_lse_ptr=partial[1], out_ptr=results[0],
        lse_ptr=results[1], **shared, **constants, **_options(_COMBINE_WARPS, 1),
    )  # fmt: skip


def _shared_arguments(
    problem: Problem, cut: Cut, cache_seqlens: Tensor, cu_seqlens_q: Tensor | None,
    attn_sink: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """What both kernels take."""
    return {
        "cache_seqlens_ptr": cache_seqlens,
        "cu_seqlens_q_ptr": cu_seqlens_q,
        "attn_sink_ptr": attn_sink,
        "s_q": problem.s_q,
        "max_seqlen": problem.max_seqlen,
        "num_splits": cut.num_splits,
        "min_split_tiles": cut.min_split_tiles,
        "empty_lse": problem.empty_lse,
    }


def _options(num_warps: int, num_stages: int) -> dict[str, Any]:
    return {"num_warps": num_warps, "num_stages": num_stages}


def _partial_results(out: Tensor, lse: Tensor, num_splits: int) -> tuple[Tensor, Tensor]:
    """Space for the normalised output and the base-2 log-sum-exp of every row and split."""
    *rows, value_dim = out.shape
    partial_out = torch.empty(*rows, num_splits, value_dim, dtype=torch.float32, device=out.device)
    return partial_out, torch.empty(*rows, num_splits, dtype=lse.dtype, device=out.device)


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


def _split_constants(
    problem: Problem, config: Config, target: KernelTarget, *, is_split: bool
) -> dict[str, Any]:
    layout = problem.layout
    d_nope = problem.d if layout is None else layout.d_nope
    pieces = channel_pieces(0, d_nope, config.channels)
    pieces += channel_pieces(d_nope, problem.d, config.channels)
    return {
        "D_NOPE": d_nope,
        "VALUE_DIM": problem.value_dim,
        "GROUP": problem.group,
        "HKV": problem.hkv,
        "BLOCK_SIZE": problem.block_size,
        "TILE": 1 if layout is None else layout.tile,
        "STRIDE_ROPE_ROW": 0 if layout is None else layout.row_bytes // 2,
        "STRIDE_SCALE_ROW": 0
        if layout is None
        else (layout.scale_row_bytes or layout.row_bytes) // 4,
        "PIECES": pieces,
        "NUM_VALUE_PIECES": sum(start < problem.value_dim for start, _, _ in pieces),
        "CAUSAL": problem.causal,
        "IS_SPLIT": is_split,
        "HAS_FP8": target.kind == "cuda" and int(target.arch) >= 89,
        "COMPUTE": _TYPES[problem.dtype],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def _combine_constants(problem: Problem, config: Config) -> dict[str, Any]:
    return {
        "H": problem.group * problem.hkv,
        "VALUE_DIM": problem.value_dim,
        "CAUSAL": problem.causal,
        "BLOCK_N": config.block_n,
        "BLOCK_S": _COMBINE_SPLITS,
        "BLOCK_C": min(_COMBINE_CHANNELS, triton.next_power_of_2(problem.value_dim)),
    }


@functools.cache
def _device(device: torch.device) -> tuple[KernelTarget, int]:
    """What kernels are compiled for there, and the number of SMs (or compute units)."""
    if device.type == "cpu":  # Triton's interpreter
        return KernelTarget("cuda", 80), 1
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        target = KernelTarget("hip", properties.gcnArchName.split(":")[0])
    else:
        target = KernelTarget("cuda", 10 * properties.major + properties.minor)
    return target, properties.multi_processor_count


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Blocks of 64 tokens, in bf16 and in both FP8 forms, read by 16 and by 128 heads."""
    cases = []
    for layout, d in (
        (None, 512),
        (None, 576),
        (KVLayout("model1_fp8", 448, 64), 512),
        (KVLayout("v32_fp8", 512, 64), 576),
    ):
        for h in (16, 128):
            problem = Problem(
                layout=layout, dtype=torch.bfloat16, d=d, value_dim=512, group=h, hkv=1,
                block_size=64, b=1, s_q=1, max_seqlen=1, softmax_scale=1.0, causal=False,
                empty_lse=0.0, deterministic=False,
            )  # fmt: skip
            config = choose_config(target, problem)
            name = f"{layout.name if layout else 'bf16'} {d} h{h}"
            cases += [_split_case(name, problem, config, target, split) for split in (False, True)]
            if layout is None:
                cases.append(_combine_case(name, problem, config))
    return cases


_SIGNATURE = {
    "q_ptr": "*bf16", "rope_ptr": "*bf16", "block_table_ptr": "*i32", "cache_seqlens_ptr": "*i32",
    "stride_table": "i32", "row_tiles": "i32", "softmax_scale": "fp32", "s_q": "i32",
    "max_seqlen": "i32", "num_splits": "i32", "min_split_tiles": "i32", "empty_lse": "fp32",
    "partial_out_ptr": "*fp32", "partial_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32",
}  # fmt: skip
_ABSENT = {"cu_seqlens_q_ptr": None, "attn_sink_ptr": None}


def _split_case(
    name: str, problem: Problem, config: Config, target: KernelTarget, is_split: bool
) -> CompileCase:
    layout, d = problem.layout, problem.d
    stride_row = d if layout is None else layout.row_bytes
    # The launcher compiles for strides that are multiples of 16, which a signature cannot say.
    strides = {
        "stride_qb": problem.group * d, "stride_qs": problem.group * d, "stride_qh": d,
        "stride_block": problem.block_size * stride_row, "stride_head": stride_row,
        "STRIDE_ROW": stride_row,
    }  # fmt: skip
    absent = _ABSENT | ({"rope_ptr": None, "scale_ptr": None} if layout is None else {})
    constants = _split_constants(problem, config, target, is_split=is_split)
    kv = "*bf16" if layout is None else "*u8"
    scale = "*fp32" if layout is not None and layout.name == "v32_fp8" else "*i32"
    out = "*fp32" if is_split else "*bf16"
    return CompileCase(
        name=f"flash_fwd_splitkv_mla {name}{' split' if is_split else ''}",
        kernel=_flash_fwd_splitkv_mla_kernel,
        signature=_SIGNATURE | {"kv_ptr": kv, "scale_ptr": scale, "out_ptr": out},
        constexprs=constants | strides | absent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _combine_case(name: str, problem: Problem, config: Config) -> CompileCase:
    return CompileCase(
        name=f"flash_fwd_mla_combine {name}",
        kernel=_flash_fwd_mla_combine_kernel,
        signature=_SIGNATURE,
        constexprs=_combine_constants(problem, config) | _ABSENT,
        num_warps=_COMBINE_WARPS,
        num_stages=1,
    )
