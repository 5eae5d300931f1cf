"""Triton kernels around Engram's tables: the hash of tokens to rows, and the rows' numbers.

Both are bound by memory. A program gathers a block of rows, whatever their order in the table.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type; loops over
# tl.static_range exist only while a kernel is compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.engram.formats import E5M3_FP32_BIAS, FP4_GROUP, FP4_LEVELS, FP8_GROUP
from model1.ops.launch import launch_options
from model1.ops.rounding import round_to

_E5M3_FP32_BIAS = tl.constexpr(E5M3_FP32_BIAS)
_LEVELS = tl.constexpr(FP4_LEVELS)
# kind: channels of a group, elements of data that they take
_GROUPS = {"bf16": (32, 32), "fp8": (FP8_GROUP, FP8_GROUP), "fp4": (FP4_GROUP, FP4_GROUP // 2)}


@dataclass(frozen=True)
class Config:
    """How the work is cut. Other cuts were not measured."""

    channels: int = 4096  # of a program that gathers, over as many rows as that gives
    hash_tokens: int = 16  # of a program that hashes
    num_warps: int = 4


@triton.jit
def _e4m3_over_256(code):
    """Value / 256 in fp32 of e4m3 bytes; the two NaN codes read as +-480, as in the reference."""
    bits = code.to(tl.int32)
    # sign to bit 31, exponent and mantissa to bits 20..26; 2^112 moves the bias from 7 to 127 - 8
    placed = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return placed.to(tl.float32, bitcast=True) * 5.192296858534828e33  # 2.0**112


@triton.jit
def _fp4_level(code):
    """The level of a code in 0..15: 8 and above are the positive ones, the others mirror them."""
    idx = tl.where(code >= 8, code - 8, 7 - code)
    level = tl.full(code.shape, _LEVELS[0], tl.float32)
    for i in tl.static_range(1, 8):
        level = tl.where(idx == i, _LEVELS[i], level)
    return tl.where(code >= 8, level, -level)


@triton.jit(do_not_specialize=["num_rows", "num_wanted"])
def _engram_gather_fwd_kernel(
    data_ptr, stride_data, scale_ptr, stride_scale, rows_ptr, out_ptr, num_rows, num_wanted,
    DIM: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.load(rows_ptr + at, mask=at < num_wanted, other=-1)
    is_row = (row >= 0) & (row < num_rows)
    first = tl.program_id(1) * BLOCK_G
    column = (first * WIDTH + tl.arange(0, BLOCK_G * WIDTH))[None]
    mask = is_row[:, None] & (column < DIM // GROUP * WIDTH + DIM % GROUP)
    code = tl.load(data_ptr + row[:, None] * stride_data + column, mask=mask, other=0)
    if KIND == "bf16":
        x = code.to(tl.float32)
    else:
        group = first + tl.arange(0, BLOCK_G)[None]
        scale_mask = is_row[:, None] & (group < DIM // GROUP)
        scale_at = scale_ptr + row[:, None] * stride_scale + group
        byte = tl.load(scale_at, mask=scale_mask, other=0).to(tl.int32)
        if KIND == "fp8":
            x = tl.reshape(_e4m3_over_256(code), (BLOCK_R, BLOCK_G, GROUP))
            # the byte is the exponent field of an fp32: byte 0 reads as 0
            factor = (byte << 23).to(tl.float32, bitcast=True) * 256.0
        else:
            bits = code.to(tl.int32)
            x = tl.join(_fp4_level(bits & 15), _fp4_level(bits >> 4))
            x = tl.reshape(x, (BLOCK_R, BLOCK_G, GROUP))
            factor = ((byte << 20) + _E5M3_FP32_BIAS).to(tl.float32, bitcast=True)
            factor = tl.where(byte == 0, 0.0, factor)
        x = tl.reshape(x * factor[:, :, None], (BLOCK_R, BLOCK_G * GROUP))
    x = tl.where(is_row[:, None], x, float("nan"))
    channel = (first * GROUP + tl.arange(0, BLOCK_G * GROUP))[None]
    out_mask = (at < num_wanted)[:, None] & (channel < DIM)
    out = round_to(x, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + at[:, None] * DIM + channel, out, mask=out_mask)


@triton.jit(do_not_specialize=["num_tokens", "vocab_size", "pad_token_id"])
def _engram_hash_fwd_kernel(
    ids_ptr, stride_ids_t, stride_ids_n, table_ptr, multipliers_ptr, sizes_ptr, offsets_ptr,
    rows_ptr, num_tokens, vocab_size, pad_token_id,
    NUM_PLACES: tl.constexpr, NUM_HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    NUM_TABLES: tl.constexpr = (NUM_PLACES - 1) * NUM_HEADS
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = token < num_tokens
    head = tl.arange(0, BLOCK_K)
    mix = tl.zeros((BLOCK_T,), tl.int64)
    is_dead = token < 0  # nowhere yet
    is_unknown = token < 0
    for place in tl.static_range(NUM_PLACES):
        id_at = ids_ptr + token * stride_ids_t + place * stride_ids_n
        token_id = tl.load(id_at, mask=is_token, other=-1)
        # latched: behind the first negative id every place counts as pad
        is_dead = is_dead | (token_id < 0)
        token_id = tl.where(is_dead, pad_token_id, token_id)
        is_unknown = is_unknown | (token_id >= vocab_size)
        known = is_token & (token_id < vocab_size)
        compressed = tl.load(table_ptr + token_id, mask=known, other=0)
        mix = mix ^ (compressed * tl.load(multipliers_ptr + place))
        if place > 0:
            column = (place - 1) * NUM_HEADS + head
            size = tl.load(sizes_ptr + column, mask=head < NUM_HEADS, other=1)[None]
            offset = tl.load(offsets_ptr + column, mask=head < NUM_HEADS, other=0)[None]
            # PyTorch's remainder has the sign of the divisor, the machine's that of the dividend
            rest = mix[:, None] % size
            rest = tl.where((rest != 0) & ((rest < 0) != (size < 0)), rest + size, rest)
            row = tl.where(is_unknown[:, None], -1, rest + offset)
            mask = is_token[:, None] & (head < NUM_HEADS)[None]
            tl.store(rows_ptr + token[:, None] * NUM_TABLES + column[None], row, mask=mask)


def engram_gather_triton(
    data: Tensor, scale: Tensor | None, rows: Tensor, dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `model1.ops.engram.gather.gather_rows`."""
    kinds = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.uint8: "fp4"}
    kind, config = kinds[data.dtype], config or Config()
    dim = data.shape[1] * (2 if kind == "fp4" else 1)
    out = torch.empty((len(rows), dim), dtype=dtype, device=data.device)
    if out.numel() == 0:
        return out
    sizes = _gather_sizes(kind, dim, config)
    codes = data if kind == "bf16" else data.view(torch.uint8)
    scales, stride_scale = (rows, 0) if scale is None else (scale, scale.stride(0))
    grid = (-(-len(rows) // sizes["BLOCK_R"]), -(-dim // (sizes["GROUP"] * sizes["BLOCK_G"])))
    kernel: Any = _engram_gather_fwd_kernel
    with torch.cuda.device_of(data):
        kernel[grid](
            codes, codes.stride(0), scales, stride_scale, rows.contiguous(), out, len(data),
            len(rows), **sizes, INTERPRETED=knobs.runtime.interpret,
            **launch_options(config.num_warps, 1),
        )  # fmt: skip
    return out


def engram_hash_triton(
    ngram_token_ids: Tensor, compression_table: Tensor, multipliers: Tensor, table_sizes: Tensor,
    table_offsets: Tensor, pad_token_id: int, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `model1.ops.engram.engram_hash`."""
    config, (t, num_places) = config or Config(), ngram_token_ids.shape
    rows = torch.empty((t, len(table_sizes)), dtype=torch.int64, device=ngram_token_ids.device)
    if t == 0:
        return rows
    constants = (compression_table, multipliers, table_sizes, table_offsets)
    kernel: Any = _engram_hash_fwd_kernel
    with torch.cuda.device_of(rows):
        kernel[(-(-t // config.hash_tokens),)](
            ngram_token_ids, *ngram_token_ids.stride(), *(x.contiguous() for x in constants), rows,
            t, len(compression_table), pad_token_id,
            **_hash_sizes(num_places, len(table_sizes), config),
            **launch_options(config.num_warps, 1),
        )  # fmt: skip
    return rows


def _gather_sizes(kind: str, dim: int, config: Config) -> dict[str, Any]:
    group, width = _GROUPS[kind]
    channels = config.channels // 2 if kind == "fp4" else config.channels  # levels take registers
    block_g = min(triton.next_power_of_2(-(-dim // group)), channels // group)
    block_r = max(1, channels // (block_g * group))
    sizes = {"DIM": dim, "KIND": kind, "GROUP": group, "WIDTH": width}
    return sizes | {"BLOCK_R": min(block_r, 64), "BLOCK_G": block_g}


def _hash_sizes(num_places: int, num_tables: int, config: Config) -> dict[str, int]:
    num_heads = num_tables // (num_places - 1)
    sizes = {"NUM_PLACES": num_places, "NUM_HEADS": num_heads}
    return sizes | {"BLOCK_T": config.hash_tokens, "BLOCK_K": triton.next_power_of_2(num_heads)}


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rows of 256 channels of every kind, in bf16, and the hash of 4-grams into 24 tables."""
    config, cases = Config(), []
    for kind, data in (("bf16", "*bf16"), ("fp8", "*u8"), ("fp4", "*u8")):
        sizes = _gather_sizes(kind, 256, config)
        strides = {"stride_data": sizes["WIDTH"] * 256 // sizes["GROUP"]}
        strides["stride_scale"] = 256 // sizes["GROUP"]
        pointers = {"data_ptr": data, "scale_ptr": "*u8", "rows_ptr": "*i64", "out_ptr": "*bf16"}
        numbers = {"num_rows": "i32", "num_wanted": "i32"}
        constants = sizes | strides | {"INTERPRETED": False}
        cases.append(
            _case(f"gather {kind}", _engram_gather_fwd_kernel, pointers | numbers, constants)
        )
    names = ("ids_ptr", "table_ptr", "multipliers_ptr", "sizes_ptr", "offsets_ptr", "rows_ptr")
    numbers = dict.fromkeys(("num_tokens", "vocab_size", "pad_token_id"), "i32")
    constants = _hash_sizes(4, 24, config) | {"stride_ids_t": 4, "stride_ids_n": 1}
    signature = {**dict.fromkeys(names, "*i64"), **numbers}
    return [*cases, _case("hash", _engram_hash_fwd_kernel, signature, constants)]


def _case(
    name: str, kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any]
) -> CompileCase:
    return CompileCase(
        name=f"engram_{name}",
        kernel=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        num_warps=Config().num_warps,
        num_stages=1,
    )
