"""Plain PyTorch for the paged KV cache: the oracle of every kernel, and the CPU backend.

The cache is seen as one long list of rows, so that a gather or a store is one indexed copy.
Arguments are as checked by the contract in `__init__.py`; nothing is checked again here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model1.ops.kv_cache.layout import E8M0_NAN, FP8_E4M3_MAX, MIN_SCALE, KVLayout

_FP8_NAN_BYTE = 0x7F
_FP32_MANTISSA_MASK = 0x7FFFFF
_FP32_MANTISSA_BITS = 23
_PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def quantize_tiles_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [..., tile] to e4m3 with one power-of-two scale per tile.

        scale = 2^ceil(log2(max(amax|x| / 448, 1e-4)))        code = e4m3(x / scale)

    Returns codes [..., tile] float8_e4m3fn and scale bytes [...] uint8, byte = log2(scale) + 127.
    A tile that holds NaN or an infinity becomes NaN throughout: codes 0x7F, scale byte 255.
    """
    x = x.float()
    ratio = (x.abs().amax(-1) / FP8_E4M3_MAX).clamp_min(MIN_SCALE)
    # The exponent field of an infinity is 255, the NaN of the scale format.
    ratio = ratio.nan_to_num(nan=torch.inf, posinf=torch.inf)
    # Exact ceil(log2(ratio)): a mantissa other than zero carries into the exponent field. A
    # logarithm in fp32 would miss ratios one ulp above a power of two.
    exponent = (ratio.view(torch.int32) + _FP32_MANTISSA_MASK) >> _FP32_MANTISSA_BITS
    scale_bytes = exponent.to(torch.uint8)
    codes = (x / _e8m0_to_fp32(scale_bytes)[..., None]).to(torch.float8_e4m3fn)
    is_nan = (scale_bytes == E8M0_NAN)[..., None]
    return codes.view(torch.uint8).masked_fill(is_nan, _FP8_NAN_BYTE).view(codes.dtype), scale_bytes


def quantize_and_store_ref(
    kv: Tensor, kv_cache: Tensor, slot_mapping: Tensor, *, layout: KVLayout, block_size: int
) -> None:
    """Write kv [t, d] into its slots of kv_cache, in place; rows of other slots are skipped."""
    kv, slots = kv.detach(), slot_mapping.long()
    kept = _is_slot(slots, kv_cache, block_size).nonzero()
    if kept.numel() < slots.numel():
        kept = kept.squeeze(1)
        kv, slots = kv.index_select(0, kept), slots.index_select(0, kept)
    rows, index = _data_rows(kv_cache, slots, layout, block_size)
    if not layout.is_fp8:
        dtype = _PLAIN_DTYPES[layout.name]
        rows = rows.view(dtype)
        rows.index_copy_(0, index, kv.type_as(rows))
        return
    codes, scale_bytes = quantize_tiles_ref(
        kv[:, : layout.d_nope].unflatten(1, (layout.num_tiles, layout.tile))
    )
    row = kv.new_zeros(slots.numel(), layout.row_bytes, dtype=torch.uint8)
    row[:, : layout.d_nope] = codes.view(torch.uint8).flatten(1)
    _row_rope(row, layout).copy_(kv[:, layout.d_nope :])
    if layout.name == "v32_fp8":
        _row_scales(row, layout).copy_(_e8m0_to_fp32(scale_bytes))
    else:
        # The padding of a scale row is written as zero so that equal input gives equal bytes.
        scale_row = kv.new_zeros(slots.numel(), layout.scale_row_bytes, dtype=torch.uint8)
        scale_row[:, : layout.num_tiles] = scale_bytes
        _write_words(*_scale_rows(kv_cache, slots, layout, block_size), scale_row)
    _write_words(rows, index, row)


def gather_and_dequantize_ref(
    kv_cache: Tensor, slots: Tensor, *, layout: KVLayout, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The tokens at `slots`, as dtype [*slots.shape, d]; what is no slot gives zeros."""
    safe, absent = _split_absent(slots, kv_cache, block_size)
    rows, index = _data_rows(kv_cache, safe, layout, block_size)
    if not layout.is_fp8:
        out = rows.view(_PLAIN_DTYPES[layout.name]).index_select(0, index).to(dtype)
    else:
        row = rows.index_select(0, index)
        if layout.name == "v32_fp8":
            scale = _row_scales(row, layout)
        else:
            scale_rows, scale_index = _scale_rows(kv_cache, safe, layout, block_size)
            scale_row = scale_rows.index_select(0, scale_index)
            scale = _e8m0_to_fp32(scale_row[:, : layout.num_tiles])
        codes = row[:, : layout.d_nope].view(torch.float8_e4m3fn).float()
        nope = codes.unflatten(1, (layout.num_tiles, layout.tile)) * scale[..., None]
        out = torch.empty(safe.numel(), layout.d, dtype=dtype, device=kv_cache.device)
        out[:, : layout.d_nope] = nope.flatten(1)
        out[:, layout.d_nope :] = _row_rope(row, layout)
    return _zero_absent(out, absent).view(*slots.shape, layout.d)


def plain_run_ref(
    kv_cache: Tensor, first_slot: int, num_tokens: int, layout: KVLayout, block_size: int
) -> Tensor | None:
    """Tokens that follow each other in the cache, as they lie there: a view [num_tokens, d].

    None where they are quantised or blocks do not touch.
    """
    if layout.is_fp8 or kv_cache.stride(0) != block_size * layout.row_bytes:
        return None
    start_bytes = kv_cache.storage_offset() + first_slot * layout.row_bytes
    run = kv_cache.as_strided((num_tokens, layout.row_bytes), (layout.row_bytes, 1), start_bytes)
    return run.view(_PLAIN_DTYPES[layout.name])


def gather_rope_ref(
    kv_cache: Tensor, slots: Tensor, *, layout: KVLayout, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Only the rotary channels at `slots`, as dtype [*slots.shape, d_rope]; zeros likewise."""
    safe, absent = _split_absent(slots, kv_cache, block_size)
    rows, index = _data_rows(kv_cache, safe, layout, block_size)
    out = _row_rope(rows, layout).index_select(0, index).to(dtype)
    return _zero_absent(out, absent).view(*slots.shape, layout.d_rope)


def _e8m0_to_fp32(scale_bytes: Tensor) -> Tensor:
    """2^(byte - 127) as fp32, byte 0 included; byte 255 is NaN."""
    scale = scale_bytes.view(torch.float8_e8m0fnu).float()
    # The cast yields a signalling NaN; stored scales get the ordinary one, 0x7FC00000.
    return scale.masked_fill(scale_bytes == E8M0_NAN, torch.nan)


def _row_scales(row: Tensor, layout: KVLayout) -> Tensor:
    """The fp32 scales inside v32_fp8 rows [n, row_bytes], as a view [n, num_tiles]."""
    return row[:, layout.d_nope : layout.d_nope + 4 * layout.num_tiles].view(torch.float32)


def _row_rope(row: Tensor, layout: KVLayout) -> Tensor:
    """The rotary channels of rows [n, row_bytes], as a view [n, d_rope] of the stored dtype."""
    dtype = torch.bfloat16 if layout.is_fp8 else _PLAIN_DTYPES[layout.name]
    return row[:, layout.rope_start_bytes :].view(dtype)


def _data_rows(
    kv_cache: Tensor, slots: Tensor, layout: KVLayout, block_size: int
) -> tuple[Tensor, Tensor]:
    """Every token row, uint8 [rows, row_bytes], and the row number of each slot."""
    return _strided_rows(kv_cache, slots, block_size, 0, layout.row_bytes)


def _scale_rows(
    kv_cache: Tensor, slots: Tensor, layout: KVLayout, block_size: int
) -> tuple[Tensor, Tensor]:
    """Every model1_fp8 scale row, uint8 [rows, scale_row_bytes], and the number of each slot."""
    start = layout.scale_plane_start_bytes(block_size)
    return _strided_rows(kv_cache, slots, block_size, start, layout.scale_row_bytes)


def _strided_rows(
    kv_cache: Tensor, slots: Tensor, block_size: int, start_bytes: int, pitch_bytes: int
) -> tuple[Tensor, Tensor]:
    """A plane of the cache as one list of rows, from the first block's first to the last one's.

    A row begins at every common divisor of pitch and block stride, so that one pitch serves all
    blocks. Rows overlap where blocks are no whole number of rows apart, and what lies between
    blocks is listed too, but no slot points to either.
    """
    stride_bytes = kv_cache.stride(0)
    step_bytes = math.gcd(stride_bytes, pitch_bytes)
    last_bytes = (kv_cache.shape[0] - 1) * stride_bytes + (block_size - 1) * pitch_bytes
    rows = kv_cache.as_strided(
        (last_bytes // step_bytes + 1, pitch_bytes),
        (step_bytes, 1),
        kv_cache.storage_offset() + start_bytes,
    )
    gap_bytes = stride_bytes - block_size * pitch_bytes
    if gap_bytes == 0:
        return rows, slots
    index = slots if step_bytes == pitch_bytes else slots * (pitch_bytes // step_bytes)
    return rows, index + slots // block_size * (gap_bytes // step_bytes)


def _write_words(rows: Tensor, index: Tensor, new: Tensor) -> None:
    """rows[index] = new, bytes moved eight at a time: seven times faster on a CPU than one."""
    rows.view(torch.int64).index_copy_(0, index, new.view(torch.int64))


def _is_slot(slots: Tensor, kv_cache: Tensor, block_size: int) -> Tensor:
    """Which numbers are slots of the cache: -1 and what lies outside are none."""
    return (slots >= 0) & (slots < len(kv_cache) * block_size)


def _split_absent(slots: Tensor, kv_cache: Tensor, block_size: int) -> tuple[Tensor, Tensor | None]:
    """Slots [n] int64 with slot 0 in place of what is none, and where, None if nowhere."""
    flat = slots.reshape(-1).long()
    absent = (~_is_slot(flat, kv_cache, block_size)).nonzero()
    if absent.numel() == 0:
        return flat, None
    absent = absent.squeeze(1)
    return flat.index_fill(0, absent, 0), absent


def _zero_absent(out: Tensor, absent: Tensor | None) -> Tensor:
    """Zero rows of out [n, d] in place. Overwrites, as slot 0 may hold NaN."""
    return out if absent is None else out.index_fill_(0, absent, 0)
