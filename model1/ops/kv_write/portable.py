"""Triton kernel that normalises, rotates, quantises and stores latents in one pass.

A program is one warp with a few tokens, so that every reduction stays inside the warp. It reads
each token once from memory; rotary channels that take part in the norm are read a second time,
from the cache of the core.
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

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache.layout import KVLayout
from model1.ops.kv_cache.portable import (
    MAX_BLOCK_ELEMENTS,
    device_constants,
    layout_constants,
    plain_block,
    target_constants,
)
from model1.ops.kv_write.encode import fp32_to_e4m3, scale_byte
from model1.ops.rope import Rotation
from model1.ops.rope_gate.pairs import rotate_pairs
from model1.ops.rounding import round_to


@dataclass(frozen=True)
class Config:
    """How the work is cut."""

    block_t: int  # tokens per program
    num_warps: int = 1


def _config(t: int) -> Config:
    # Few tokens are a matter of latency: one per program. Four of them are measured for 8,192 to
    # 65,536 tokens on an H200, 2026-11-23 (docs/log.md).
    return Config(block_t=1 if t < 4096 else 4)


@triton.jit(do_not_specialize=["t", "num_slots"])
def _kv_write_fwd_kernel(
    kv_ptr, stride_kv_t, stride_kv_d, kv_cache_ptr, stride_block, num_slots, slot_ptr, stride_slot,
    weight_ptr, cos_ptr, sin_ptr, latent_ptr, t, eps,
    D_NOPE: tl.constexpr, D_ROPE: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROW_BYTES: tl.constexpr, ROPE_START: tl.constexpr, SCALE_FIELDS: tl.constexpr,
    SCALES_IN_ROW: tl.constexpr, ITEM: tl.constexpr, ITEM_BYTES: tl.constexpr,
    BLOCK_ROPE: tl.constexpr, NORM_WIDTH: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_ROTATION: tl.constexpr, HAS_LATENT: tl.constexpr, NATIVE: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # NORM_WIDTH = 0: the latents are stored as they come
    DTYPE: tl.constexpr = kv_ptr.dtype.element_ty
    WIDTH: tl.constexpr = max(D_NOPE, NORM_WIDTH)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = (token < t)[:, None]
    slot = tl.load(slot_ptr + token * stride_slot, mask=token < t, other=-1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    is_nope = (channel < D_NOPE)[None]
    kv_row = kv_ptr + token[:, None] * stride_kv_t
    is_read = is_token & (channel < WIDTH)[None]
    x_ptr = kv_row + channel.to(tl.int64)[None] * stride_kv_d
    x = tl.load(x_ptr, mask=is_read, other=0.0).to(tl.float32)
    turn = tl.arange(0, BLOCK_ROPE)
    is_rope = is_token & (turn < D_ROPE)[None]
    rope_ptr = kv_row + (D_NOPE + turn).to(tl.int64)[None] * stride_kv_d
    rope = tl.load(rope_ptr, mask=is_rope, other=0.0).to(tl.float32)

    # Every step rounds to the dtype of kv, as separate operators would.
    if NORM_WIDTH > 0:
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / NORM_WIDTH + eps)[:, None]
        x *= factor
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + channel, mask=channel < WIDTH, other=0.0)
            x *= round_to(weight.to(tl.float32), DTYPE, INTERPRETED).to(tl.float32)[None]
        x = round_to(x, DTYPE, INTERPRETED).to(tl.float32)
        if NORM_WIDTH > D_NOPE:
            rope *= factor
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + D_NOPE + turn, mask=turn < D_ROPE, other=0.0)
                rope *= round_to(weight.to(tl.float32), DTYPE, INTERPRETED).to(tl.float32)[None]
            rope = round_to(rope, DTYPE, INTERPRETED).to(tl.float32)
    if HAS_ROTATION:
        angle = token[:, None] * D_ROPE + turn[None]
        cos = tl.load(cos_ptr + angle, mask=is_rope, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=is_rope, other=0.0)
        rope = round_to(rotate_pairs(rope, cos, sin), DTYPE, INTERPRETED).to(tl.float32)
    if HAS_LATENT:
        latent_row = latent_ptr + token[:, None] * (D_NOPE + D_ROPE)
        latent = round_to(x, DTYPE, INTERPRETED)
        tl.store(latent_row + channel[None], latent, mask=is_token & is_nope)
        latent = round_to(rope, DTYPE, INTERPRETED)
        tl.store(latent_row + D_NOPE + turn[None], latent, mask=is_rope)

    is_stored = ((slot >= 0) & (slot < num_slots))[:, None]
    slot = tl.where(is_stored, slot[:, None], 0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    item_ptr = kv_cache_ptr.to(tl.pointer_type(ITEM))  # pyright: ignore[reportArgumentType]
    item = block * (stride_block // ITEM_BYTES) + offset * (ROW_BYTES // ITEM_BYTES)
    rope_ptr = item_ptr + (item + ROPE_START // ITEM_BYTES) + turn[None]
    rope = round_to(rope, ITEM, INTERPRETED)
    tl.store(rope_ptr, rope, mask=is_stored & (turn < D_ROPE)[None])
    if SCALE_FIELDS == 0:
        row = round_to(x, ITEM, INTERPRETED)
        tl.store(item_ptr + item + channel[None], row, mask=is_stored & is_nope)
    else:
        tiles = tl.reshape(x, (BLOCK_T, BLOCK_D // TILE, TILE))
        byte = scale_byte(tiles, axis=2)
        # 1 / scale, and NaN for a tile whose scale is NaN, which makes all of its codes NaN
        inverse = tl.where(byte == 255, 0x7FC00000, (254 - byte) << 23).to(tl.float32, bitcast=True)
        code = fp32_to_e4m3(tl.reshape(tiles * inverse[:, :, None], (BLOCK_T, BLOCK_D)), NATIVE)
        code_ptr = kv_cache_ptr + (block * stride_block + offset * ROW_BYTES) + channel[None]
        # 8 codes a thread: the 8 channels they come from are one 16-byte load in bf16
        tl.store(tl.multiple_of(code_ptr, (1, 8)), code, mask=is_stored & is_nope)
        tile = tl.arange(0, BLOCK_D // TILE)[None]
        is_field, is_scale = is_stored & (tile < SCALE_FIELDS), tile * TILE < D_NOPE
        if SCALES_IN_ROW:
            bits = tl.where(byte == 255, 0x7FC00000, byte << 23)
            word_ptr = kv_cache_ptr.to(tl.pointer_type(tl.int32))
            word = block * (stride_block // 4) + offset * (ROW_BYTES // 4) + D_NOPE // 4
            tl.store(word_ptr + word + tile, tl.where(is_scale, bits, 0), mask=is_field)
        else:
            start = block * stride_block + BLOCK_SIZE * ROW_BYTES + offset * SCALE_FIELDS
            scale = tl.where(is_scale, byte, 0).to(tl.uint8)
            tl.store(kv_cache_ptr + start + tile, scale, mask=is_field)


def norm_rope_store_triton(
    kv: Tensor,
    norm_weight: Tensor | None,
    rotation: Rotation,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    eps: float,
    norm_width: int,
    return_latent: bool,
    config: Config | None = None,
) -> Tensor:
    """See `model1.ops.kv_write.norm_rope_store`."""
    num_rows = kv.shape[0] if return_latent else 0
    latent = torch.empty(num_rows, layout.d, dtype=kv.dtype, device=kv.device)
    flags = {
        "NORM_WIDTH": norm_width,
        "HAS_WEIGHT": norm_weight is not None,
        "HAS_ROTATION": layout.d_rope > 0,
        "HAS_LATENT": return_latent,
    }
    cos, sin = (angles.contiguous() for angles in rotation)
    weight = kv if norm_weight is None else norm_weight.contiguous()
    others = (weight, cos, sin, latent)
    _launch(kv, kv_cache, slot_mapping, others, eps, layout, block_size, flags, config)
    return latent


def quantize_and_store_triton(
    kv: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    config: Config | None = None,
) -> None:
    """See `model1.ops.kv_cache.quantize_and_store`."""
    flags = {"NORM_WIDTH": 0, "HAS_WEIGHT": False, "HAS_ROTATION": False, "HAS_LATENT": False}
    unused = (kv, kv, kv, kv)
    _launch(kv, kv_cache, slot_mapping, unused, 0.0, layout, block_size, flags, config)


def _launch(
    kv: Tensor, kv_cache: Tensor, slot_mapping: Tensor, others: tuple[Tensor, ...], eps: float,
    layout: KVLayout, block_size: int, flags: dict[str, Any], config: Config | None,
) -> None:  # fmt: skip
    t = kv.shape[0]
    if t == 0:
        return
    config = config or _config(t)
    constants = _constants(layout, block_size, flags, config) | device_constants(kv.device)
    kernel: Any = _kv_write_fwd_kernel
    with torch.cuda.device_of(kv):
        kernel[(-(-t // constants["BLOCK_T"]),)](
            kv, *kv.stride(), kv_cache, kv_cache.stride(0), len(kv_cache) * block_size,
            slot_mapping, slot_mapping.stride(0), *others, t, eps,
            **constants, num_warps=config.num_warps,
        )  # fmt: skip


def _constants(
    layout: KVLayout, block_size: int, flags: dict[str, Any], config: Config
) -> dict[str, Any]:
    block_d = plain_block(layout, max(layout.d_nope, flags["NORM_WIDTH"]))
    block_t = max(1, min(config.block_t, MAX_BLOCK_ELEMENTS * config.num_warps // block_d))
    blocks = {"BLOCK_T": block_t, "BLOCK_D": block_d}
    return layout_constants(layout, block_size) | flags | blocks


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """The write paths of MODEL1 and V3.2 for few and many tokens, and the plain store."""
    signature = {
        "kv_ptr": "*bf16", "kv_cache_ptr": "*u8", "slot_ptr": "*i64", "weight_ptr": "*fp32",
        "cos_ptr": "*fp32", "sin_ptr": "*fp32", "latent_ptr": "*bf16", "t": "i32", "eps": "fp32",
        "num_slots": "i32",
    }  # fmt: skip
    cases = []
    for layout in (KVLayout("model1_fp8", 448, 64), KVLayout("v32_fp8", 512, 64)):
        width = layout.d if layout.name == "model1_fp8" else layout.d_nope
        for name, t, fused in (
            ("norm_rope_store", 1, True),
            ("norm_rope_store", 1 << 20, True),
            ("store", 1 << 20, False),
        ):
            config = _config(t)
            flags = {
                "NORM_WIDTH": width if fused else 0,
                "HAS_WEIGHT": fused,
                "HAS_ROTATION": fused,
                "HAS_LATENT": fused,
            }
            constants = _constants(layout, 64, flags, config) | target_constants(target)
            # aligned strides, which the launcher would tell the compiler about
            constants |= {
                "stride_kv_t": layout.d,
                "stride_kv_d": 1,
                "stride_slot": 1,
                "stride_block": layout.block_stride_bytes(64),
            }
            cases.append(
                CompileCase(
                    name=f"{name} {layout.name} x{constants['BLOCK_T']}",
                    kernel=_kv_write_fwd_kernel,
                    signature=signature | dict.fromkeys(constants, "constexpr"),
                    constexprs=constants,
                    num_warps=config.num_warps,
                    num_stages=1,
                )
            )
    return cases
