"""The Triton store and gather of cached tokens: the same bytes and numbers as the reference."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kv_golden import GOLDEN_TOKENS, GoldenToken
from torch import Tensor

from model1.ops.kv_cache import (
    KVLayout,
    allocate_kv_cache,
    gather_and_dequantize,
    gather_rope,
    quantize_and_store,
)

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.kv_write.portable import Config, quantize_and_store_triton

# Without a GPU the kernels run in Triton's interpreter, which a GPU build does not offer.
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same kernels")
DEVICES = [
    pytest.param("cpu", marks=INTERPRETED, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
LAYOUTS = [
    KVLayout("model1_fp8", 448, 64),
    KVLayout("model1_fp8", 640, 32),  # ten scales: two 8-byte words per token
    KVLayout("model1_fp8", 64, 0),
    KVLayout("v32_fp8", 512, 64),
    KVLayout("v32_fp8", 640, 8),  # five scales: 20 bytes, padded to 32
    KVLayout("bf16", 48, 16),
    KVLayout("fp32", 5, 3),
    KVLayout("fp32", 7, 0),
]


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def _name(layout: KVLayout) -> str:
    return f"{layout.name}-{layout.d_nope}+{layout.d_rope}"


def _buffers(layout: KVLayout, num_blocks: int, block_size: int, device: str) -> Tensor:
    """Two caches full of NaN, [2, num_blocks, ...], another layer's block before each of theirs."""
    step = layout.block_step_bytes  # blocks of FP8 are no whole number of rows apart
    stride = (-(-layout.block_bytes(block_size) // step) + 1) * step
    return torch.full((2, num_blocks, 2, stride), 0xFF, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("golden", GOLDEN_TOKENS, ids=lambda golden: golden.layout.name)
def test_golden_bytes(golden: GoldenToken, device: str) -> None:
    cache = allocate_kv_cache(2, 2, golden.layout, device)
    token, slot = golden.token[None].to(device), torch.tensor([3], device=device)
    quantize_and_store(token, cache, slot, layout=golden.layout, block_size=2, backend="triton")
    assert bytes(cache[0].tolist()) == bytes(len(golden.block))
    assert bytes(cache[1].tolist()) == golden.block


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_bytes_and_numbers_are_those_of_the_reference(layout: KVLayout, device: str) -> None:
    """Strided kv and slots, -1 among them, wide range, NaN wherever nothing is written."""
    t, block_size = 9, 3
    kv = torch.randn(t, 2 * layout.d) * torch.logspace(-30, 30, t)[:, None]
    kv[3] = 0.0
    if layout.is_fp8:
        kv[5, 2], kv[6, 2] = -math.nan, -math.inf
    slots = torch.randperm(7 * block_size)[:t].repeat_interleave(2)
    slots[[0, 14]] = -1
    kv, slots = kv.to(device)[:, ::2], slots.to(device)[::2]
    buffers = _buffers(layout, 7, block_size, device)
    caches = buffers[:, :, 1, : layout.block_bytes(block_size)]
    options = {"layout": layout, "block_size": block_size}
    for cache, backend in zip(caches, ("ref", "triton"), strict=True):
        quantize_and_store(kv, cache, slots, **options, backend=backend)
    assert torch.equal(buffers[0], buffers[1])
    read = torch.stack([slots, slots.flip(0)], dim=1).int()
    for gather, dtype in (
        (gather_and_dequantize, torch.float32),
        (gather_and_dequantize, torch.bfloat16),
        (gather_rope, torch.float16),
        (gather_rope, torch.float64),
    ):
        want, got = (
            gather(caches[0], read, **options, dtype=dtype, backend=backend)
            for backend in ("ref", "triton")
        )
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_every_scale_border_and_every_tie_between_codes(device: str) -> None:
    layout = KVLayout("model1_fp8", 64, 0)
    borders = torch.tensor(448.0) * 2.0 ** torch.arange(-20, 119)
    largest = torch.cat([borders.nextafter(torch.tensor(s)) for s in (0.0, math.inf)] + [borders])
    tokens = torch.rand(len(largest), 64) * largest[:, None]
    tokens[:, 7] = largest
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([1e-40, 2.0**-149])])
    ties = torch.cat([ties, -ties, torch.tensor([448.0] * 2)]).view(-1, 64)
    ties[:, 0] = 448.0  # scale 1
    kv = torch.cat([tokens, ties]).to(device)
    slots = torch.arange(len(kv), device=device)
    caches = [allocate_kv_cache(len(kv), 1, layout, device) for _ in range(2)]
    options = {"layout": layout, "block_size": 1}
    quantize_and_store(kv, caches[0], slots, **options, backend="ref")
    # many tokens a program: the interpreter takes its time per operation
    config = Config(block_t=64, num_warps=16)
    quantize_and_store_triton(kv, caches[1], slots, **options, config=config)
    assert torch.equal(*caches)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS[:5], ids=_name)
def test_gather_decodes_every_byte(layout: KVLayout, device: str) -> None:
    """Random bytes: every code, every scale byte and arbitrary fp32 scales, NaN among them."""
    cache = torch.randint(0, 256, (3, layout.block_stride_bytes(4)), dtype=torch.uint8)
    if layout.name == "model1_fp8":  # the ends of the scale range, beside the random ones
        cache[0, layout.scale_plane_start_bytes(4) :][:3] = torch.tensor([0, 254, 255])
    cache, slots = cache.to(device), torch.arange(12, device=device).view(3, 4)
    options = {"layout": layout, "block_size": 4}
    want = gather_and_dequantize(cache, slots, **options, backend="ref")
    got = gather_and_dequantize(cache, slots, **options, backend="triton")
    # Triton 3.6's interpreter widens subnormal bf16 numbers wrongly.
    rope = slice(layout.d_nope, None)
    for values in (got, want):
        values[..., rope].masked_fill_(values[..., rope].abs() < 2.0**-126, 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_absent_slots_read_zero_and_write_nothing(device: str) -> None:
    for layout in (LAYOUTS[0], LAYOUTS[3], LAYOUTS[5]):
        options = {"layout": layout, "block_size": 4, "backend": "triton"}
        cache = allocate_kv_cache(2, 4, layout, device).fill_(0xFF)
        slots = torch.full((3,), -1, device=device)
        quantize_and_store(torch.ones(3, layout.d, device=device), cache, slots, **options)
        assert (cache == 0xFF).all()
        out = gather_and_dequantize(cache, slots, **options)
        assert torch.equal(out, torch.zeros(3, layout.d, device=device))
        rope = gather_rope(cache, slots, **options, dtype=torch.bfloat16)
        assert torch.equal(rope, torch.zeros(3, layout.d_rope, device=device).bfloat16())


def _hostile_slots(num_slots: int, dtype: torch.dtype, device: str) -> Tensor:
    """Two slots of a cache, and numbers just and far outside."""
    limits = torch.iinfo(dtype)
    outside = [num_slots, num_slots + 1, limits.max, -2, -num_slots, limits.min]
    if dtype == torch.int64:
        outside += [2**31, 2**32 + 1, 2**40, -(2**31) - 1, -(2**32)]
    return torch.tensor([0, *outside, num_slots - 1], dtype=dtype, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_slots_outside_the_cache_stand_for_nothing(
    backend: str, dtype: torch.dtype, device: str
) -> None:
    """What a GPU and a compiled graph run, neither of which looks at slots before."""
    for layout in (LAYOUTS[0], LAYOUTS[3], LAYOUTS[6]):
        fields = (layout.name, layout.d_nope, layout.d_rope, 4)
        buffers = _buffers(layout, 3, 4, device)
        cache, want = buffers[:, :2, 1, : layout.block_bytes(4)]  # a third block lies behind
        slots = _hostile_slots(8, dtype, device)
        kv = torch.randn(len(slots), layout.d).to(device)
        torch.ops.model1.quantize_and_store(kv, cache, slots, *fields, backend)
        inside = (slots >= 0) & (slots < 8)
        options = {"layout": layout, "block_size": 4, "backend": "ref"}
        quantize_and_store(kv[inside], want, slots[inside], **options)
        assert torch.equal(*buffers)
        for rope_only, gather in ((False, gather_and_dequantize), (True, gather_rope)):
            read = (cache, slots, *fields, rope_only, torch.float32, backend)
            got = torch.ops.model1.gather_and_dequantize(*read)
            assert torch.equal(got[inside], gather(want, slots[inside], **options))
            assert not got[~inside].any()
        assert torch.equal(*buffers)


def test_a_cpu_looks_at_slots_and_a_graph_does_not() -> None:
    layout = KVLayout("model1_fp8", 64, 32)
    cache = allocate_kv_cache(2, 4, layout, "cpu")
    kv, slots = torch.ones(2, layout.d), torch.tensor([8, 3])

    def step(kv: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        quantize_and_store(kv, cache, slots, layout=layout, block_size=4)
        return gather_and_dequantize(cache, slots, layout=layout, block_size=4)

    with pytest.raises(ValueError, match="-1 or a slot below 8, got 8"):
        step(kv, cache, slots)
    assert not cache.any()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(kv, cache, slots)
    assert torch.equal(out, torch.stack([torch.zeros(layout.d), torch.ones(layout.d)]))


@pytest.mark.parametrize("device", DEVICES)
def test_slots_latents_and_blocks_may_be_strided(device: str) -> None:
    layout = KVLayout("model1_fp8", 64, 32)
    cache = torch.zeros(3, 2, layout.block_stride_bytes(4), dtype=torch.uint8, device=device)[:, 1]
    kv = torch.randn(5, 2 * layout.d, generator=torch.Generator().manual_seed(0))[:, ::2]
    slots = torch.tensor([[7, 0], [-1, 0], [2, 0], [11, 0], [0, 0]])[:, 0]
    options = {"layout": layout, "block_size": 4}
    expected = cache.cpu().clone()
    quantize_and_store(kv, expected, slots, **options, backend="ref")
    slots = torch.stack([slots, slots], dim=1).to(device)[:, 0]
    quantize_and_store(kv.to(device), cache, slots, **options, backend="triton")
    assert torch.equal(cache.cpu(), expected)
    got = gather_and_dequantize(cache, slots, **options, backend="triton")
    want = gather_and_dequantize(expected, slots.cpu(), **options, backend="ref")
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_and_one(device: str) -> None:
    layout = KVLayout("model1_fp8", 64, 32)
    options = {"layout": layout, "block_size": 4, "backend": "triton"}
    cache = allocate_kv_cache(2, 4, layout, device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    quantize_and_store(torch.empty(0, layout.d, device=device), cache, none, **options)
    assert (cache == 0).all()
    assert gather_and_dequantize(cache, none.view(0, 7), **options).shape == (0, 7, layout.d)
    assert gather_rope(cache, none, **options).shape == (0, 32)
    one = torch.tensor(5, device=device)
    quantize_and_store(torch.ones(1, layout.d, device=device), cache, one[None], **options)
    out = gather_and_dequantize(cache, one, **options)
    assert torch.equal(out, torch.ones(layout.d, device=device))


def test_addresses_beyond_four_gibibytes() -> None:
    """A cache of untouched pages, which take no memory."""
    for layout in (LAYOUTS[0], LAYOUTS[3], KVLayout("bf16", 192, 64)):
        stride = layout.block_stride_bytes(64)
        num_blocks = 2**32 // stride + 2
        cache = torch.frombuffer(mmap.mmap(-1, num_blocks * stride), dtype=torch.uint8)
        _store_and_read_far(cache.view(num_blocks, stride), layout, num_blocks * 64 - 1)


def test_slots_beyond_32_bits() -> None:
    layout, block_size = KVLayout("bf16", 1, 0), 2**20
    pages = mmap.mmap(-1, 2049 * layout.block_stride_bytes(block_size))
    cache = torch.frombuffer(pages, dtype=torch.uint8).view(2049, -1)
    _store_and_read_far(cache, layout, 2**31 + 5, block_size)


def test_channels_beyond_two_giga_elements() -> None:
    layout, step = KVLayout("bf16", 3, 2), 2**29  # channel 4 lies 2^31 elements on
    pages = torch.frombuffer(mmap.mmap(-1, 2 * (4 * step + 8)), dtype=torch.bfloat16)
    kv = pages.as_strided((2, layout.d), (1, step)).copy_(torch.randn(2, layout.d))
    caches = [allocate_kv_cache(1, 2, layout, "cpu") for _ in range(2)]
    for x, cache in zip((kv, kv.contiguous()), caches, strict=True):
        quantize_and_store(
            x, cache, torch.arange(2), layout=layout, block_size=2, backend="triton"
        )  # fmt: skip
    assert torch.equal(*caches)


@pytest.mark.gpu
def test_addresses_beyond_four_gibibytes_on_a_gpu() -> None:
    for layout in (LAYOUTS[0], LAYOUTS[3]):
        num_blocks = 2**32 // layout.block_stride_bytes(64) + 2
        cache = allocate_kv_cache(num_blocks, 64, layout, "cuda")
        _store_and_read_far(cache, layout, num_blocks * 64 - 1)


def _store_and_read_far(cache: Tensor, layout: KVLayout, slot: int, block_size: int = 64) -> None:
    """A 32-bit byte offset or slot would wrap to the start of the buffer."""
    options = {"layout": layout, "block_size": block_size, "backend": "triton"}
    far = torch.tensor([slot], device=cache.device)
    near = torch.tensor([0, 1, 5, 6], device=cache.device)
    quantize_and_store(torch.ones(1, layout.d, device=cache.device), cache, far, **options)
    assert (gather_and_dequantize(cache, far, **options) == 1).all()
    assert (gather_and_dequantize(cache, near, **options) == 0).all()


@pytest.mark.parametrize("device", DEVICES[:1])
def test_the_ops_describe_themselves_to_pytorch(device: str) -> None:
    layout = KVLayout("model1_fp8", 64, 32)
    cache = allocate_kv_cache(2, 4, layout, device)
    slots = torch.tensor([3, -1, 7], device=device)
    kv = torch.randn(3, layout.d, device=device)
    fields = (layout.name, layout.d_nope, layout.d_rope, 4)
    for backend in ("ref", "triton"):
        ops = torch.ops.model1
        arguments = (cache, slots[None], *fields)
        torch.library.opcheck(ops.quantize_and_store.default, (kv, cache, slots, *fields, backend))
        for rope_only, dtype in ((False, torch.bfloat16), (True, torch.float32)):
            torch.library.opcheck(
                ops.gather_and_dequantize.default, (*arguments, rope_only, dtype, backend)
            )


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_one_graph_under_torch_compile(backend: str, device: str) -> None:
    layout = KVLayout("model1_fp8", 64, 32)
    options = {"layout": layout, "block_size": 4, "backend": backend}

    def step(kv: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        quantize_and_store(kv, cache, slots, **options)
        return gather_and_dequantize(cache, slots, **options).sum(-1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    kv, slots = torch.randn(3, layout.d, device=device), torch.tensor([3, -1, 7], device=device)
    caches = [allocate_kv_cache(2, 4, layout, device) for _ in range(2)]
    want, got = step(kv, caches[0], slots), compiled(kv, caches[1], slots)
    assert torch.equal(want, got)
    assert torch.equal(*caches)
