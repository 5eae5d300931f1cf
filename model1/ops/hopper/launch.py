"""What the launches of all kernels for Hopper have in common."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from model1.errors import BackendUnavailable
from model1.ops.compile_cases import CompileCase
from model1.ops.hopper.attend import tile_layout
from model1.ops.hopper.combine import _flash_fwd_mla_combine_kernel
from model1.ops.hopper.overlap import OVERLAP
from model1.ops.hopper.schedule import Split
from model1.ops.launch import launch_options

HEADS = 64  # of a program
CHANNELS = 512  # of values
ROPE = 64  # channels behind them, where rows have such
ALIGNMENT_BYTES = 16  # of what a tensor map describes and of what is copied
# Warp groups share 65,536 registers: four where keys are converted, with 184 for those that attend
# they spill, and three where keys are copied, whose gatherers have what the others leave.
FP8: dict[str, Any] = {
    "IS_BF16": False, "COLUMNS": 0, "CONSUMER_REGISTERS": 192, "PRODUCER_REGISTERS": 64
}  # fmt: skip
BF16: dict[str, Any] = {
    "IS_BF16": True, "COLUMNS": 0, "CONSUMER_REGISTERS": 216, "PRODUCER_REGISTERS": 72
}  # fmt: skip
# With keys on the rows a program has 8, 16 or 32 heads. Registers of an attending and of a
# gathering thread, over FP8 and bf16 rows, chosen for the fewest spills and not against others.
_FEW_FP8 = {8: (144, 112), 16: (144, 112), 32: (176, 80)}
_FEW_BF16 = {8: (168, 168), 16: (168, 168), 32: (192, 120)}
MAX_FEW_HEADS = 32
COMBINE_WARPS = 4
OVERLAPS: dict[str, Any] = {"OVERLAPS": True}
FP8_OPTIONS = {"num_warps": 4, "maxnreg": 128}
BF16_OPTIONS = {"num_warps": 4, "maxnreg": 168}
SPILL_LIMIT_BYTES = 72  # of the kernels that convert; docs/kernels_hopper.md says where


def body_sizes(is_bf16: bool, h: int) -> dict[str, Any]:
    """The body's constants for h heads on the rows of products or, up to 32, on their columns.

    On an H200, 2026-12-01, the latter took 0.80 to 0.97 of the former's time with 8 to 32 heads.
    """
    rows = BF16 if is_bf16 else FP8
    if h > MAX_FEW_HEADS:
        return rows
    few = _FEW_BF16 if is_bf16 else _FEW_FP8
    columns = min(heads for heads in few if heads >= h)
    attending, gathering = few[columns]
    return rows | {
        "COLUMNS": columns, "CONSUMER_REGISTERS": attending, "PRODUCER_REGISTERS": gathering
    }  # fmt: skip


def tensor_map(x: Tensor, channels: int, heads: int = HEADS) -> TensorDescriptor:
    """[b, s_q, h, d] in pieces of so many heads and channels.

    What a tensor map cannot describe is copied first.
    """
    strides = [x.element_size() * stride for stride in x.stride()[:-1]]
    if x.data_ptr() % ALIGNMENT_BYTES or any(s % ALIGNMENT_BYTES or s == 0 for s in strides):
        x = x.clone(memory_format=torch.contiguous_format)
    block: Any = [1, 1, heads, channels], tile_layout(4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), *block)


def addressing(
    units: int, size: int, divisor: int, shift: int, last_slot: int
) -> tuple[int, int, int, int, int]:
    """How a kernel finds a slot, `Scope.addressing`; the divisor's 32 bits are read with a sign."""
    return units, size, divisor - ((divisor >> 31) << 32), shift, last_slot


def check_start(operator: str, cache: Tensor) -> None:
    """Raise BackendUnavailable for a cache whose rows cannot be copied in pieces of 16 bytes.

    Asked at the launch: a graph that is traced cannot know where a tensor starts.
    """
    start = cache.data_ptr() % ALIGNMENT_BYTES
    if start:
        rule = f"takes caches that start at multiples of {ALIGNMENT_BYTES} bytes"
        raise BackendUnavailable(f"{operator}/hopper {rule}, got {start} bytes behind one")


def partial_results(
    plan: Tensor | Split | None, num_parts: int, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Room for two results, and their lse, of 64 heads for each program if rows are split."""
    if not isinstance(plan, Split):
        return out, lse  # which are not written as such
    sizes = {"dtype": torch.float32, "device": out.device}
    return (
        torch.empty(2 * num_parts, HEADS, CHANNELS, **sizes),
        torch.empty(2 * num_parts, HEADS, **sizes),
    )


def merge_sizes(has_many: bool) -> dict[str, Any]:
    """A program merges all of a row from few parts, or some of its channels from many."""
    return {"BLOCK_S": 32, "BLOCK_C": 128} if has_many else {"BLOCK_S": 8, "BLOCK_C": CHANNELS}


def launch_merge(
    plan: Tensor | Split | None, out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor,
    attn_sink: Tensor | None, rows: int, h: int, groups: int, num_programs: int, empty_lse: float,
) -> None:  # fmt: skip
    """Add up what programs found out about parts of a row, if rows are split."""
    if isinstance(plan, Split):
        num_rows = rows - plan.first_row
        sizes = merge_sizes(num_programs > 8 * num_rows)
        _flash_fwd_mla_combine_kernel[(num_rows * h * CHANNELS // sizes["BLOCK_C"],)](
            out, lse, partial, partial_lse, attn_sink, plan.bounds, plan.spans, plan.first_row, h,
            groups, num_programs, empty_lse, BLOCK_G=triton.next_power_of_2(num_programs),
            **sizes, **OVERLAPS, **launch_options(COMBINE_WARPS, 1), **OVERLAP,
        )  # fmt: skip


_TENSOR_MAP = (
    "tensordesc<bf16[1, 1, {}, {}],NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, "
    "rank=4, transposed=False, fp4_padded=False, cga_layout=[])>"
)
_TYPES = {
    "out_ptr": "*bf16", "lse_ptr": "*fp32", "max_ptr": "*fp32",
    "partial_ptr": "*fp32", "partial_lse_ptr": "*fp32", "sink_ptr": "*fp32", "main_cache": "*u8",
    "extra_cache": "*u8", "items_ptr": "*i32", "main_slots": "*i32", "extra_slots": "*i32",
    "bounds_ptr": "*i32", "spans_ptr": "*i32", "length_ptr": "*i32", "extra_length_ptr": "*i32",
    "topk_indices_ptr": "*i32",
    "block_table_ptr": "*i32", "cache_ptr": "*u8", "kv_ptr": "*u8", "scale_log2": "fp32",
    "empty_lse": "fp32",
}  # fmt: skip


def few_cases(
    name: str, kernel: Any, is_bf16: bool, constants: dict[str, Any]
) -> list[CompileCase]:
    """The launches with 8, 16 and 32 heads on the columns of products."""
    limits: dict[str, Any] = launch_options(4, 1)
    limits["max_registers"] = (BF16_OPTIONS if is_bf16 else FP8_OPTIONS)["maxnreg"]
    limits["spill_limit_bytes"] = SPILL_LIMIT_BYTES
    return [
        compile_case(f"{name} {h} columns", kernel, body_sizes(is_bf16, h) | constants, limits)
        for h in _FEW_FP8
    ]


def compile_case(
    name: str, kernel: Any, constants: dict[str, Any], options: dict[str, Any]
) -> CompileCase:
    """A launch to be compiled ahead of time."""
    heads = constants.get("COLUMNS", 0) or HEADS
    maps = {"q_desc": 256, "rope_desc": ROPE, "out_desc": 256}
    types = dict.fromkeys(kernel.arg_names, "i32") | _TYPES
    types |= {n: _TENSOR_MAP.format(heads, channels) for n, channels in maps.items()}
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    return CompileCase(f"hopper {name}", kernel, signature, constants, **options)
