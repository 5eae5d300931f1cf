"""Triton kernel that reads cached tokens at a list of slots and dequantises them.

A program is one warp with a few slots: nothing is exchanged between warps, and the loads of its
tokens are in flight together.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache.bits import e4m3_to_fp32, e8m0_to_fp32
from model1.ops.kv_cache.layout import KVLayout
from model1.ops.launch import device_target
from model1.ops.rounding import round_to

# Channels of one program; more would not fit one warp's registers.
MAX_BLOCK_ELEMENTS = 2048


@dataclass(frozen=True)
class Config:
    """How the work is cut."""

    block_n: int  # slots per program
    num_warps: int = 1


def _config(n: int) -> Config:
    # Few slots are a matter of latency: one per program. Not yet measured.
    return Config(block_n=1 if n < 4096 else 4)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n > 0)."""
    return 1 << (n - 1).bit_length()


def layout_constants(layout: KVLayout, block_size: int) -> dict[str, Any]:
    """The compile-time constants of a layout that both cache kernels take."""
    in_row = layout.name == "v32_fp8"
    fields = (layout.rope_start_bytes - layout.d_nope) // 4 if in_row else layout.scale_row_bytes
    item = tl.float32 if layout.name == "fp32" else tl.bfloat16
    return {
        "D_NOPE": layout.d_nope,
        "D_ROPE": layout.d_rope,
        "TILE": layout.tile,
        "BLOCK_SIZE": block_size,
        "ROW_BYTES": layout.row_bytes,
        "ROPE_START": layout.rope_start_bytes,
        "SCALE_FIELDS": fields,  # scales of a token with their padding; 0 = not quantised
        "SCALES_IN_ROW": in_row,  # fp32 inside the row, or bytes in a plane behind the rows
        "ITEM": item,  # what is not quantised is stored as this
        "ITEM_BYTES": item.primitive_bitwidth // 8,
        "BLOCK_ROPE": next_power_of_2(max(layout.d_rope, 2)),  # pairs; no channel of it may exist
    }


def plain_block(layout: KVLayout, width: int) -> int:
    """Channels of the block that holds `width` channels of a token and all of its scale fields."""
    fields = layout_constants(layout, 1)["SCALE_FIELDS"]
    return next_power_of_2(max(width, fields * layout.tile))


def device_constants(device: torch.device) -> dict[str, bool]:
    """How a kernel converts numbers on this device: the compile-time constants that say so."""
    return {"NATIVE": device_target(device).has_fp8, "INTERPRETED": knobs.runtime.interpret}


def target_constants(target: KernelTarget) -> dict[str, bool]:
    """`device_constants` of a GPU that is not there."""
    return {"NATIVE": target.has_fp8, "INTERPRETED": False}


@triton.jit(do_not_specialize=["n", "num_slots"])
def _kv_gather_fwd_kernel(
    kv_cache_ptr, stride_block, num_slots, slot_ptr, out_ptr, n,
    D_NOPE: tl.constexpr, D_ROPE: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROW_BYTES: tl.constexpr, ROPE_START: tl.constexpr, SCALE_FIELDS: tl.constexpr,
    SCALES_IN_ROW: tl.constexpr, ITEM: tl.constexpr, ITEM_BYTES: tl.constexpr,
    BLOCK_ROPE: tl.constexpr, HAS_NOPE: tl.constexpr, NATIVE: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < n
    slot = tl.load(slot_ptr + row, mask=is_row, other=-1).to(tl.int64)
    is_present = (slot >= 0) & (slot < num_slots)
    slot = tl.where(is_present, slot, 0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    item_ptr = kv_cache_ptr.to(tl.pointer_type(ITEM))  # pyright: ignore[reportArgumentType]
    item = block * (stride_block // ITEM_BYTES) + offset * (ROW_BYTES // ITEM_BYTES)
    out_row = out_ptr + row * (D_NOPE * HAS_NOPE + D_ROPE)
    if HAS_NOPE:
        channel = tl.arange(0, BLOCK_D)
        is_nope = (channel < D_NOPE)[None]
        is_read = is_present[:, None] & is_nope
        if SCALE_FIELDS == 0:
            x = tl.load(item_ptr + item[:, None] + channel[None], mask=is_read, other=0.0)
        else:
            start = (block * stride_block + offset * ROW_BYTES)[:, None] + channel[None]
            # 8 codes a thread: its 8 results then are one 16-byte store in bf16
            code_ptr = tl.multiple_of(kv_cache_ptr + start, (1, 8))
            code = tl.load(code_ptr, mask=is_read, other=0)
            if NATIVE:
                value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            else:
                value = e4m3_to_fp32(code)
            tile = tl.arange(0, BLOCK_D // TILE)
            has_scale = is_present[:, None] & (tile * TILE < D_NOPE)[None]
            if SCALES_IN_ROW:
                scale_ptr = kv_cache_ptr.to(tl.pointer_type(tl.float32))
                first = block * (stride_block // 4) + offset * (ROW_BYTES // 4) + D_NOPE // 4
                scale = tl.load(scale_ptr + first[:, None] + tile[None], mask=has_scale, other=0.0)
            else:
                first = block * stride_block + BLOCK_SIZE * ROW_BYTES + offset * SCALE_FIELDS
                byte_ptr = kv_cache_ptr + first[:, None] + tile[None]
                scale = e8m0_to_fp32(tl.load(byte_ptr, mask=has_scale, other=0))
            tiles = tl.reshape(value, (BLOCK_N, BLOCK_D // TILE, TILE)) * scale[:, :, None]
            x = tl.reshape(tiles, (BLOCK_N, BLOCK_D))
        out = round_to(x.to(tl.float32), DTYPE, INTERPRETED)
        tl.store(out_row[:, None] + channel[None], out, mask=is_row[:, None] & is_nope)
    turn = tl.arange(0, BLOCK_ROPE)
    is_rope = (turn < D_ROPE)[None]
    rope_ptr = item_ptr + (item + ROPE_START // ITEM_BYTES)[:, None] + turn[None]
    rope = tl.load(rope_ptr, mask=is_present[:, None] & is_rope, other=0.0).to(tl.float32)
    rope_out_ptr = out_row[:, None] + D_NOPE * HAS_NOPE + turn[None]
    out = round_to(rope, DTYPE, INTERPRETED)
    tl.store(rope_out_ptr, out, mask=is_row[:, None] & is_rope)


def gather_and_dequantize_triton(
    kv_cache: Tensor,
    slots: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """See `model1.ops.kv_cache.gather_and_dequantize`."""
    return _gather(kv_cache, slots, layout, block_size, dtype, config, has_nope=True)


def gather_rope_triton(
    kv_cache: Tensor,
    slots: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """See `model1.ops.kv_cache.gather_rope`."""
    return _gather(kv_cache, slots, layout, block_size, dtype, config, has_nope=False)


def _gather(
    kv_cache: Tensor, slots: Tensor, layout: KVLayout, block_size: int, dtype: torch.dtype,
    config: Config | None, *, has_nope: bool,
) -> Tensor:  # fmt: skip
    flat = slots.reshape(-1).contiguous()  # a strided row stays a strided view
    n, width = flat.numel(), layout.d if has_nope else layout.d_rope
    out = torch.empty(*slots.shape, width, dtype=dtype, device=kv_cache.device)
    if out.numel() == 0:
        return out
    config = config or _config(n)
    constants = _constants(layout, block_size, has_nope, config)
    constants |= device_constants(kv_cache.device)
    kernel: Any = _kv_gather_fwd_kernel
    with torch.cuda.device_of(kv_cache):
        kernel[(-(-n // constants["BLOCK_N"]),)](
            kv_cache, kv_cache.stride(0), len(kv_cache) * block_size, flat, out, n,
            **constants, num_warps=config.num_warps,
        )  # fmt: skip
    return out


def _constants(layout: KVLayout, block_size: int, has_nope: bool, config: Config) -> dict[str, Any]:
    block_d = plain_block(layout, layout.d_nope)
    block_n = max(1, min(config.block_n, MAX_BLOCK_ELEMENTS * config.num_warps // block_d))
    blocks = {"HAS_NOPE": has_nope, "BLOCK_N": block_n, "BLOCK_D": block_d}
    return layout_constants(layout, block_size) | blocks


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Gathers of few and of many MODEL1 and V3.2 tokens to bf16."""
    signature = {
        "kv_cache_ptr": "*u8", "slot_ptr": "*i64", "out_ptr": "*bf16", "n": "i32",
        "num_slots": "i32",
    }  # fmt: skip
    cases = []
    for layout in (KVLayout("model1_fp8", 448, 64), KVLayout("v32_fp8", 512, 64)):
        for n in (1, 1 << 20):
            config = _config(n)
            constants = _constants(layout, 64, True, config) | target_constants(target)
            constants["stride_block"] = layout.block_stride_bytes(64)
            cases.append(
                CompileCase(
                    name=f"kv_gather {layout.name} x{constants['BLOCK_N']}",
                    kernel=_kv_gather_fwd_kernel,
                    signature=signature | dict.fromkeys(constants, "constexpr"),
                    constexprs=constants,
                    num_warps=config.num_warps,
                    num_stages=1,
                )
            )
    return cases
