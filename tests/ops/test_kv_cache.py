"""KV-cache bytes against literal ones, against naive decoding, and under hostile input."""

from __future__ import annotations

import math
import mmap
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_golden import GOLDEN_TOKENS, GoldenToken
from torch import Tensor

from model1.ops.kv_cache import (
    KVLayout,
    allocate_kv_cache,
    gather_and_dequantize,
    gather_rope,
    quantize_and_store,
)
from model1.ops.kv_cache.ref import quantize_tiles_ref

MODEL1 = KVLayout("model1_fp8", 448, 64)
V32 = KVLayout("v32_fp8", 512, 64)
FP8_LAYOUTS = [
    MODEL1,
    V32,
    KVLayout("model1_fp8", 64, 64),
    KVLayout("model1_fp8", 192, 64),
    KVLayout("model1_fp8", 640, 32),  # ten scales: two 8-byte words per token
    KVLayout("model1_fp8", 128, 0),
    KVLayout("v32_fp8", 128, 32),
    KVLayout("v32_fp8", 640, 0),  # five scales: 20 bytes, padded to 32
]
LAYOUTS = [*FP8_LAYOUTS, KVLayout("bf16", 48, 16), KVLayout("fp32", 5, 3), KVLayout("fp32", 7, 0)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _name(layout: KVLayout) -> str:
    return f"{layout.name}-{layout.d_nope}+{layout.d_rope}"


def _e4m3_value(code: int) -> float:
    """OCP FP8 E4M3: bias 7, no infinity, all ones is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def _e8m0_value(byte: int) -> float:
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def _bf16_values(raw: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]


def _naive_token(block: bytes, offset: int, layout: KVLayout, block_size: int) -> list[float]:
    """One token read from a block's bytes by the tables of the two FP8 formats."""
    nope, rope = layout.d_nope, 2 * layout.d_rope
    if layout.name == "model1_fp8":
        start, scale_bytes = offset * (nope + rope), -(-(nope // 64) // 8) * 8
        first = block_size * (nope + rope) + offset * scale_bytes
        scales = [_e8m0_value(b) for b in block[first : first + nope // 64]]
        rope_start, tile = start + nope, 64
    else:
        scale_bytes = -(-(nope // 128 * 4) // 16) * 16
        start, tile = offset * (nope + scale_bytes + rope), 128
        scales = list(struct.unpack_from(f"<{nope // 128}f", block, start + nope))
        rope_start = start + nope + scale_bytes
    values = [
        float(np.float32(_e4m3_value(block[start + i])) * np.float32(scales[i // tile]))
        for i in range(nope)
    ]
    return values + _bf16_values(block[rope_start : rope_start + rope])


@pytest.mark.parametrize("golden", GOLDEN_TOKENS, ids=lambda golden: golden.layout.name)
def test_golden_bytes(golden: GoldenToken) -> None:
    cache = allocate_kv_cache(2, 2, golden.layout, "cpu")
    slot = torch.tensor([3])
    quantize_and_store(golden.token[None], cache, slot, layout=golden.layout, block_size=2)
    assert bytes(cache[0].tolist()) == bytes(len(golden.block))
    assert bytes(cache[1].tolist()) == golden.block


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8))
def test_scales_and_codes_follow_the_formula(values: list[float]) -> None:
    codes, scale_byte = quantize_tiles_ref(torch.tensor([values]))
    ratio = max(np.float32(max(map(abs, values))) / np.float32(448), np.float32(1e-4))
    mantissa, exponent = math.frexp(ratio)
    exponent -= mantissa == 0.5
    assert scale_byte.item() == exponent + 127
    table = [_e4m3_value(code) for code in range(127)]
    for value, code in zip(values, codes.view(torch.uint8)[0].tolist(), strict=True):
        scaled = abs(float(value)) / 2.0**exponent
        # Round to nearest; of two codes equally near, the even one.
        nearest = min(range(127), key=lambda c: (abs(table[c] - scaled), c % 2))
        assert code & 0x7F == nearest
        assert code >> 7 == (math.copysign(1, value) < 0)


@pytest.mark.parametrize("layout", FP8_LAYOUTS, ids=_name)
def test_gather_decodes_every_byte(layout: KVLayout) -> None:
    """Random bytes, so every code, every scale byte and arbitrary fp32 scales occur."""
    generator = torch.Generator().manual_seed(1)
    block_size, num_blocks = 5, 4
    shape = (num_blocks, layout.block_stride_bytes(block_size))
    cache = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if layout.name == "model1_fp8":  # the ends of the scale range, beside the random ones
        plane = layout.scale_plane_start_bytes(block_size)
        cache[0, plane : plane + 3 * layout.scale_row_bytes : layout.scale_row_bytes] = (
            torch.tensor([0, 254, 255], dtype=torch.uint8)
        )
    out = gather_and_dequantize(cache, torch.arange(20), layout=layout, block_size=block_size)
    blocks = [bytes(block.tolist()) for block in cache]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = torch.tensor(
            [_naive_token(blocks[s // 5], s % 5, layout, block_size) for s in range(20)]
        )
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    rounded = gather_and_dequantize(
        cache, torch.arange(20), layout=layout, block_size=block_size, dtype=torch.bfloat16
    )
    torch.testing.assert_close(rounded, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


def _round_trip_bound(kv: Tensor, layout: KVLayout) -> Tensor:
    """Largest legal |stored - kv|: half an ulp of the format that holds each channel."""
    bf16_bound = kv.abs() * 2.0**-8
    if not layout.is_fp8:
        return bf16_bound if layout.name == "bf16" else torch.zeros_like(kv)
    tiles = kv[:, : layout.d_nope].unflatten(1, (layout.num_tiles, layout.tile)).double()
    scale = 2 * (tiles.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-4)  # at least 2^ceil
    bound = torch.maximum(tiles.abs() * 2.0**-4, scale * 2.0**-10).flatten(1)
    return torch.cat([bound, bf16_bound[:, layout.d_nope :]], dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [1, 5, 64])
@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_round_trip_leaves_every_other_byte(layout: KVLayout, block_size: int, device: str) -> None:
    """NaN bytes everywhere else, strided kv, slots and cache, -1 among the slots, wide range."""
    num_blocks, t = 21, 17
    # One layer's blocks inside a buffer of two layers, each block one row longer than needed.
    stride = layout.block_stride_bytes(block_size) + layout.row_bytes
    buffer = torch.full((num_blocks, 2, stride), 0xFF, dtype=torch.uint8, device=device)
    cache = buffer[:, 1, : layout.block_bytes(block_size)]
    kv = torch.randn(t, 2 * layout.d) * torch.logspace(-6, 3, t)[:, None]
    kv = kv.to(device)[:, ::2]
    slots = torch.randperm(num_blocks * block_size)[:t]
    slots[[0, 9]] = -1
    slots = torch.stack([slots, slots], dim=1).to(device)[:, 0]
    quantize_and_store(kv, cache, slots, layout=layout, block_size=block_size)

    out = gather_and_dequantize(cache, slots, layout=layout, block_size=block_size)
    kept = slots >= 0
    error = (out.double() - kv.double()).abs()
    assert (error <= _round_trip_bound(kv.double(), layout))[kept].all()
    assert (out[~kept] == 0).all()
    rope = gather_rope(cache, slots, layout=layout, block_size=block_size)
    assert torch.equal(rope, out[:, layout.d_nope :])
    assert (buffer[:, 0] == 0xFF).all()
    assert (buffer[:, 1, cache.shape[1] :] == 0xFF).all()
    unread = torch.ones(num_blocks * block_size, dtype=torch.bool, device=device)
    unread[slots[kept]] = False
    rest = unread.nonzero().squeeze(1)
    assert gather_and_dequantize(cache, rest, layout=layout, block_size=block_size).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_absent_slots_read_zero_even_where_slot_0_is_nan(layout: KVLayout) -> None:
    cache = allocate_kv_cache(2, 4, layout, "cpu").fill_(0xFF)
    slots = torch.full((3, 2), -1)
    out = gather_and_dequantize(cache, slots, layout=layout, block_size=4)
    rope = gather_rope(cache, slots, layout=layout, block_size=4, dtype=torch.bfloat16)
    assert torch.equal(out, torch.zeros(3, 2, layout.d))
    assert torch.equal(rope, torch.zeros(3, 2, layout.d_rope, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", [MODEL1, KVLayout("v32_fp8", 640, 0)], ids=_name)
def test_padding_bytes_are_never_read(layout: KVLayout) -> None:
    cache = allocate_kv_cache(1, 2, layout, "cpu")
    quantize_and_store(
        torch.randn(2, layout.d), cache, torch.arange(2), layout=layout, block_size=2
    )
    before = gather_and_dequantize(cache, torch.arange(2), layout=layout, block_size=2)
    # The eighth scale byte of each MODEL1 token; bytes 20..31 of each V3.2 scale field.
    padding = [[1159, 1167], [*range(660, 672), *range(1332, 1344)]][layout.name == "v32_fp8"]
    assert (cache[0, padding] == 0).all()
    cache[0, padding] = 0xFF
    after = gather_and_dequantize(cache, torch.arange(2), layout=layout, block_size=2)
    assert torch.equal(before, after)


@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_splitting_and_reordering_the_tokens_changes_no_byte(layout: KVLayout) -> None:
    kv, slots = torch.randn(9, layout.d), torch.randperm(12)[:9]
    caches = [allocate_kv_cache(3, 4, layout, "cpu") for _ in range(3)]
    quantize_and_store(kv, caches[0], slots, layout=layout, block_size=4)
    for part in torch.arange(9).split(4):
        quantize_and_store(kv[part], caches[1], slots[part], layout=layout, block_size=4)
    quantize_and_store(kv.flip(0), caches[2], slots.flip(0).int(), layout=layout, block_size=4)
    assert torch.equal(caches[0], caches[1])
    assert torch.equal(caches[0], caches[2])


@pytest.mark.parametrize("layout", FP8_LAYOUTS, ids=_name)
def test_one_bad_channel_spoils_its_tile_only(layout: KVLayout) -> None:
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        kv = torch.ones(1, layout.d)
        kv[0, 3] = bad
        cache = allocate_kv_cache(1, 1, layout, "cpu")
        quantize_and_store(kv, cache, torch.tensor([0]), layout=layout, block_size=1)
        out = gather_and_dequantize(cache, torch.tensor([0]), layout=layout, block_size=1)
        assert out[0, : layout.tile].isnan().all()
        assert (cache[0, : layout.tile] == 0x7F).all()  # one NaN, whatever the sign was
        assert (out[0, layout.tile :] == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_no_tokens(layout: KVLayout) -> None:
    cache = allocate_kv_cache(2, 4, layout, "cpu")
    none = torch.empty(0, dtype=torch.int64)
    quantize_and_store(torch.empty(0, layout.d), cache, none, layout=layout, block_size=4)
    quantize_and_store(
        torch.ones(2, layout.d), cache, torch.tensor([-1, -1]), layout=layout, block_size=4
    )
    assert (cache == 0).all()
    out = gather_and_dequantize(cache, none.view(0, 7), layout=layout, block_size=4)
    rope = gather_rope(cache, none, layout=layout, block_size=4)
    assert out.shape == (0, 7, layout.d)
    assert rope.shape == (0, layout.d_rope)


@pytest.mark.parametrize(
    "layout", [MODEL1, V32, KVLayout("bf16", 192, 64), KVLayout("fp32", 192, 64)], ids=_name
)
def test_addresses_beyond_four_gibibytes(layout: KVLayout) -> None:
    stride = layout.block_stride_bytes(64)
    num_blocks = 2**32 // stride + 2
    # Untouched pages of an anonymous mapping take no memory.
    pages = mmap.mmap(-1, num_blocks * stride)
    cache = torch.frombuffer(pages, dtype=torch.uint8).view(num_blocks, stride)
    # A 32-bit byte offset would wrap to the start of the buffer.
    last = torch.tensor([num_blocks * 64 - 1], dtype=torch.int32)
    quantize_and_store(torch.ones(1, layout.d), cache, last, layout=layout, block_size=64)
    slots = torch.cat([last, torch.arange(128, dtype=torch.int32)])
    out = gather_and_dequantize(cache, slots, layout=layout, block_size=64)
    assert (out[0] == 1).all()
    assert (out[1:] == 0).all()


def test_slots_beyond_32_bits() -> None:
    layout, block_size = KVLayout("bf16", 1, 0), 2**20
    pages = mmap.mmap(-1, 2049 * layout.block_stride_bytes(block_size))
    cache = torch.frombuffer(pages, dtype=torch.uint8).view(2049, -1)
    slot = torch.tensor([2**31 + 5])
    quantize_and_store(torch.ones(1, 1), cache, slot, layout=layout, block_size=block_size)
    slots = torch.tensor([5, 2**31 + 5, 2**31 + 6])
    out = gather_and_dequantize(cache, slots, layout=layout, block_size=block_size)
    assert out.squeeze(1).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_gradients_stop_and_every_float_dtype_is_taken(dtype: torch.dtype) -> None:
    for layout in (KVLayout("fp32", 64, 8), KVLayout("model1_fp8", 64, 8)):
        kv = torch.linspace(-1, 1, layout.d, dtype=dtype)[None].requires_grad_()
        cache = allocate_kv_cache(1, 1, layout, "cpu")
        quantize_and_store(kv, cache, torch.tensor([0]), layout=layout, block_size=1)
        out = gather_and_dequantize(
            cache, torch.tensor([0]), layout=layout, block_size=1, dtype=dtype
        )
        assert out.dtype == dtype
        assert not out.requires_grad
        assert ((out - kv).abs() <= 2.0**-4).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", FP8_LAYOUTS, ids=_name)
def test_bytes_do_not_depend_on_the_device(layout: KVLayout, device: str) -> None:
    kv = torch.randn(64, layout.d) * torch.logspace(-9, 9, 64)[:, None]
    caches = [allocate_kv_cache(1, 64, layout, where) for where in ("cpu", device)]
    for cache in caches:
        slots = torch.arange(64, device=cache.device)
        quantize_and_store(kv.to(cache.device), cache, slots, layout=layout, block_size=64)
    assert torch.equal(caches[0], caches[1].cpu())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv": torch.ones(2, 7)}, r"kv must be \[t, 8\], got \[2, 7\]"),
        ({"kv": torch.ones(2, 8).int()}, "kv must be floating point, got torch.int32"),
        ({"slots": torch.tensor([0, 1, 2])}, r"slot_mapping must be \[2\] like kv, got \[3\]"),
        ({"slots": torch.tensor([0, 12])}, "-1 or a slot below 12, got 12"),
        ({"slots": torch.tensor([-2, 0])}, "-1 or a slot below 12, got -2"),
        ({"slots": torch.tensor([0.0, 1.0])}, "must be int64 or int32, got torch.float32"),
        ({"slots": torch.ones(2, device="meta").long()}, "cache's device cpu, got meta"),
        ({"cache": torch.zeros(3, 128)}, "kv_cache must be uint8, got torch.float32"),
        ({"cache": torch.zeros(3, 127).byte()}, r"at least 128 bytes.*got \[3, 127\]"),
        ({"cache": torch.zeros(384).byte()}, r"at least 128 bytes.*got \[384\]"),
        ({"cache": torch.zeros(128, 3).byte().T}, r"contiguous.*strides \(1, 3\)"),
        ({"cache": torch.zeros(3, 136).byte()}, r"multiple of 32 bytes.*strides \(136, 1\)"),
        ({"cache": torch.zeros(1, 128).byte().expand(3, 128)}, r"got strides \(0, 1\)"),
        ({"cache": torch.zeros(386).byte()[2:].view(3, 128)}, "start at a multiple of 4 .*got 2"),
        ({"block_size": 0}, "block_size must be positive, got 0"),
    ],
)
def test_bad_arguments_name_value_and_rule(change: dict[str, Tensor | int], message: str) -> None:
    good = {
        "kv": torch.ones(2, 8),
        "cache": torch.zeros(3, 128).byte(),
        "slots": torch.tensor([0, -1]),
        "block_size": 4,
    }
    kv, cache, slots, block_size = {**good, **change}.values()
    options = {"layout": KVLayout("fp32", 6, 2), "block_size": block_size}
    with pytest.raises(ValueError, match=message):
        quantize_and_store(kv, cache, slots, **options)
    if "kv" in change or slots.shape == (3,):
        return  # a gather takes no kv and slots of any shape
    for gather in (gather_and_dequantize, gather_rope):
        with pytest.raises(ValueError, match=message):
            gather(cache, slots, **options)


def test_bad_output_dtype_and_allocation() -> None:
    layout = KVLayout("fp32", 6, 2)
    cache = allocate_kv_cache(1, 1, layout, "cpu")
    with pytest.raises(ValueError, match=r"dtype must be floating point, got torch\.uint8"):
        gather_rope(cache, torch.tensor([0]), layout=layout, block_size=1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="num_blocks must be positive, got 0"):
        allocate_kv_cache(0, 1, layout, "cpu")
    with pytest.raises(ValueError, match="block_size must be positive, got -1"):
        allocate_kv_cache(1, -1, layout, "cpu")
