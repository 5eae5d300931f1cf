"""Norm, rotation and store in one pass: the formula in fp64, and kernels against separate steps."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from backend_option import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.kv_cache import KVLayout, allocate_kv_cache, gather_and_dequantize
from model1.ops.kv_write import NORM_ROPE_STORE, norm_rope_store
from model1.ops.rope import Rotation, rope_frequencies, rotation

# Without a GPU the kernels run in Triton's interpreter, which a GPU build does not offer.
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same kernels")
DEVICES = [
    pytest.param("cpu", marks=INTERPRETED, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
LAYOUTS = [
    KVLayout("model1_fp8", 448, 64),
    KVLayout("model1_fp8", 64, 64),
    KVLayout("model1_fp8", 192, 32),
    KVLayout("model1_fp8", 320, 0),
    KVLayout("model1_fp8", 640, 32),
    KVLayout("v32_fp8", 512, 64),
    KVLayout("v32_fp8", 128, 0),
    KVLayout("bf16", 448, 64),
    KVLayout("fp32", 48, 16),
    KVLayout("fp32", 5, 2),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def _angles(positions: Tensor, d_rope: int) -> Rotation:
    return rotation(positions, rope_frequencies(d_rope, 10000.0).to(positions.device))


@given(
    t=st.integers(0, 4),
    d_nope=st.integers(1, 9),
    pairs=st.integers(0, 3),
    normalise_all=st.booleans(),
    has_weight=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_equals_the_formula_in_float64(
    t: int, d_nope: int, pairs: int, normalise_all: bool, has_weight: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layout = KVLayout("fp32", d_nope, 2 * pairs)
    width = layout.d if normalise_all else d_nope
    kv, positions = torch.randn(t, layout.d), torch.randint(0, 1000, (t,))
    weight = torch.randn(width) if has_weight else None
    cache = allocate_kv_cache(2, 3, layout, "cpu")
    slots = torch.randperm(6)[:t]
    angles = _angles(positions, layout.d_rope)
    got = norm_rope_store(
        kv, weight, angles, cache, slots,
        layout=layout, block_size=3, eps=1e-3, norm_width=width,
    )  # fmt: skip

    want = kv.double()
    head = want[:, :width] / (want[:, :width].square().mean(-1, keepdim=True) + 1e-3).sqrt()
    want[:, :width] = head if weight is None else head * weight
    pair = torch.view_as_complex(want[:, d_nope:].clone().unflatten(-1, (pairs, 2)))
    turn = positions[:, None] * rope_frequencies(layout.d_rope, 10000.0)
    turned = pair * torch.polar(torch.ones_like(turn), turn)
    want[:, d_nope:] = torch.view_as_real(turned).flatten(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    read = gather_and_dequantize(cache, slots, layout=layout, block_size=3)
    assert torch.equal(read, got)


def _case(number: int, device: str, max_t: int) -> tuple[dict[str, Any], Tensor]:
    """Arguments of call `number`, and the buffer that its cache is a part of.

    What a kernel is compiled for repeats every 90 numbers, the rest is random.
    """
    torch.manual_seed(number)
    layout, dtype = LAYOUTS[number % len(LAYOUTS)], DTYPES[number % 3]
    variant = number // 30 % 3
    width = layout.d_nope if variant == 1 else layout.d
    weight = (1.0 + 0.3 * torch.randn(width)).to(DTYPES[variant]).to(device)
    t, block_size = int(torch.randint(1, max_t + 1, ())), (1, 5, 64)[variant]
    num_blocks = -(-2 * t // block_size)
    # fp16 overflows at 65504; what is not normalised keeps its size
    spread = torch.logspace(-3, 3, t)[torch.randperm(t)]
    step = 1 + number // 30 % 2
    kv = (torch.randn(t, step * layout.d) * spread[:, None]).to(dtype).to(device)[:, ::step]
    slots = torch.randperm(num_blocks * block_size)[:t]
    slots[torch.rand(t) < 0.2] = -1
    # each block one row longer than needed, between the blocks of another layer
    stride = layout.block_stride_bytes(block_size) + layout.row_bytes
    buffer = torch.full((num_blocks, 2, stride), 0xFF, dtype=torch.uint8, device=device)
    arguments = {
        "kv": kv,
        "norm_weight": None if variant == 2 else weight,
        "rotation": _angles(torch.randint(0, 100000, (t,)).to(device), layout.d_rope),
        "kv_cache": buffer[:, 1, : layout.block_bytes(block_size)],
        "slot_mapping": slots.to((torch.int64, torch.int32)[number % 2]).to(device),
        "layout": layout,
        "block_size": block_size,
        "eps": 1e-6,
        "norm_width": width,
    }
    return arguments, buffer


def _size(x: Tensor, layout: KVLayout) -> Tensor:
    """What the rounding error of each channel of x [t, d] is relative to."""
    plain, rope = x.abs().split([layout.d_nope, layout.d_rope], dim=-1)
    if layout.is_fp8:  # small codes of a tile are as coarse as its scale
        plain = plain.maximum(plain.amax(-1, keepdim=True) * 2.0**-10 + 2.0**-19)
    pairs = rope.unflatten(-1, (-1, 2)).norm(dim=-1)  # either channel may be their difference
    return torch.cat([plain, pairs.repeat_interleave(2, dim=-1)], dim=-1)


def _check_against_separate_steps(arguments: dict[str, Any], buffer: Tensor, where: str) -> None:
    """The kernel stores and returns what norm, rotation and store do one after the other.

    The sum of the norm runs in another order, and a product and a sum may be fused. So a number
    may come out as the neighbour of the right one in its format: at most 1 % of the latents in
    16 bits and 0.2 % of the bytes of a quantised cache.
    """
    layout, kv = arguments["layout"], arguments["kv"]
    other = buffer.clone()
    place = {"size": arguments["kv_cache"].shape, "stride": arguments["kv_cache"].stride()}
    caches = [b.as_strided(**place, storage_offset=b[0, 0].numel()) for b in (buffer, other)]
    latents = [
        norm_rope_store(**{**arguments, "kv_cache": cache, "backend": backend})
        for cache, backend in zip(caches, ("ref", "triton"), strict=True)
    ]
    want, got = (latent.double() for latent in latents)
    step = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[kv.dtype]
    assert ((got - want).abs() <= step * _size(want, layout)).all(), where
    if kv.dtype != torch.float32:
        assert (got != want).double().mean() <= 0.01, where

    changed = (buffer != other).double().mean() * buffer.numel()
    if layout.is_fp8 or kv.dtype != torch.float32:
        stored = (arguments["slot_mapping"] >= 0).sum() * layout.bytes_per_token
        assert changed <= 1 + 0.002 * stored, f"{where}: {changed:.0f} of {stored} bytes"
    slots = arguments["slot_mapping"]
    read = {"layout": layout, "block_size": arguments["block_size"], "backend": "ref"}
    want, got = (gather_and_dequantize(cache, slots, **read).double() for cache in caches)
    step = {"bf16": 2.0**-7, "fp32": step}.get(layout.name, 2.0**-3)
    assert ((got - want).abs() <= step * _size(want, layout)).all(), where
    # nothing but the rows of the slots was touched
    rest = torch.arange(len(buffer) * arguments["block_size"], device=kv.device)
    rest = rest[~torch.isin(rest, slots)]
    for cache in caches:
        assert gather_and_dequantize(cache, rest, **read).isnan().all(), where


@INTERPRETED
@pytest.mark.triton
@pytest.mark.parametrize("number", [*range(20), 33, 35, 38, 60, 65])
def test_kernel_equals_separate_steps(number: int) -> None:
    arguments, buffer = _case(number, "cpu", max_t=5)
    _check_against_separate_steps(arguments, buffer, f"case {number}")


@pytest.mark.gpu
def test_kernel_equals_separate_steps_on_a_gpu() -> None:
    for number in range(500):
        arguments, buffer = _case(number, "cuda", max_t=300 if number % 10 else 9000)
        _check_against_separate_steps(arguments, buffer, f"case {number}")


def _small(device: str, t: int = 4) -> dict[str, Any]:
    layout = KVLayout("model1_fp8", 64, 32)
    return {
        "kv": torch.randn(t, layout.d, device=device),
        "norm_weight": torch.rand(layout.d, device=device) + 0.5,
        "rotation": _angles(torch.arange(t, device=device), layout.d_rope),
        "kv_cache": allocate_kv_cache(3, 4, layout, device),
        "slot_mapping": torch.tensor([3, -1, 7, 11], device=device)[:t],
        "layout": layout,
        "block_size": 4,
        "eps": 1e-6,
        "norm_width": layout.d,
        "backend": "triton",
    }


@pytest.mark.triton
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_do_not_depend_on_each_other(device: str) -> None:
    from model1.ops.kv_write.portable import Config, norm_rope_store_triton

    arguments = _small(device)
    latent = norm_rope_store(**arguments)
    order = torch.tensor([2, 0, 3, 1], device=device)
    permuted = arguments | {
        "kv": arguments["kv"][order],
        "rotation": Rotation(*(angles[order] for angles in arguments["rotation"])),
        "slot_mapping": arguments["slot_mapping"][order],
        "kv_cache": torch.zeros_like(arguments["kv_cache"]),
    }
    assert torch.equal(norm_rope_store(**permuted), latent[order])
    assert torch.equal(permuted["kv_cache"], arguments["kv_cache"])
    two = {"block_t": 2, "num_warps": 1}
    names = ("kv", "norm_weight", "rotation", "kv_cache", "slot_mapping")
    options = {k: v for k, v in arguments.items() if k not in (*names, "backend")}
    again = torch.zeros_like(arguments["kv_cache"])
    inputs = [again if name == "kv_cache" else arguments[name] for name in names]
    got = norm_rope_store_triton(*inputs, **options, return_latent=True, config=Config(**two))
    assert torch.equal(got, latent)
    assert torch.equal(again, arguments["kv_cache"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_latent_only_the_cache_is_written(backend: str, device: str) -> None:
    arguments = _small(device) | {"backend": backend}
    norm_rope_store(**arguments)
    other = arguments | {"kv_cache": torch.zeros_like(arguments["kv_cache"])}
    nothing = norm_rope_store(**other, return_latent=False)
    assert nothing.shape == (0, 96)
    assert torch.equal(other["kv_cache"], arguments["kv_cache"])
    nowhere = other | {"slot_mapping": torch.full_like(other["slot_mapping"], -1)}
    norm_rope_store(**nowhere)
    assert torch.equal(other["kv_cache"], arguments["kv_cache"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_outside_the_cache_are_not_written(backend: str, device: str) -> None:
    """A GPU and a compiled graph do not look at slots before they run."""
    arguments = _small(device) | {"backend": backend}
    latent = norm_rope_store(**arguments)
    buffer = torch.zeros_like(arguments["kv_cache"]).repeat(2, 1)
    cos, sin = arguments["rotation"]
    name = NORM_ROPE_STORE.resolve(backend, cos.device)
    for wrong in (12, 13, 23, 2**31, 2**40, -2, -(2**31), -(2**63)):
        slots = arguments["slot_mapping"].clone()
        slots[1] = wrong
        got = torch.ops.model1.norm_rope_store(
            arguments["kv"], arguments["norm_weight"], cos, sin, buffer[:3], slots,
            "model1_fp8", 64, 32, 4, 1e-6, 96, True, name,
        )  # fmt: skip
        assert torch.equal(got, latent)
        assert torch.equal(buffer[:3], arguments["kv_cache"])
        assert not buffer[3:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_one(backend: str, device: str) -> None:
    arguments = _small(device, t=0) | {"backend": backend}
    assert norm_rope_store(**arguments).shape == (0, 96)
    assert (arguments["kv_cache"] == 0).all()
    arguments = _small(device, t=1) | {"backend": backend}
    latent = norm_rope_store(**arguments)
    assert latent.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.5)
    assert (arguments["kv_cache"][0] != 0).any()
    assert (arguments["kv_cache"][1:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_channel_spoils_what_the_norm_covers(bad: float, backend: str, device: str) -> None:
    layout = KVLayout("v32_fp8", 256, 32)
    arguments = _small(device, t=3) | {
        "layout": layout, "norm_weight": None, "norm_width": 256, "backend": backend,
        "kv": torch.ones(3, layout.d, device=device),
        "kv_cache": allocate_kv_cache(3, 4, layout, device),
        "slot_mapping": torch.tensor([2, 5, 8], device=device),
    }  # fmt: skip
    arguments["kv"][0, 3] = arguments["kv"][1, 260] = bad
    norm_rope_store(**arguments)
    read = gather_and_dequantize(
        arguments["kv_cache"], arguments["slot_mapping"], layout=layout, block_size=4, backend="ref"
    )
    if math.isnan(bad):
        assert read[0, :256].isnan().all()
    else:  # the norm of an infinite vector makes the rest zero
        assert read[0, :128].isnan().all()
        assert (read[0, 128:256] == 0).all()
    assert read[0, 256:].isfinite().all()
    assert read[1, :256].isfinite().all()
    assert not read[1, 260:262].isfinite().any()
    assert read[1, 262:].isfinite().all()
    assert read[2].isfinite().all()


@pytest.mark.triton
def test_addresses_beyond_four_gibibytes() -> None:
    arguments = _small("cpu", t=1)
    stride = arguments["layout"].block_stride_bytes(4)
    num_blocks = 2**32 // stride + 2
    pages = torch.frombuffer(mmap.mmap(-1, num_blocks * stride), dtype=torch.uint8)
    far = arguments | {
        "kv_cache": pages.view(num_blocks, stride),
        "slot_mapping": torch.tensor([4 * num_blocks - 1], dtype=torch.int32),
    }
    norm_rope_store(**arguments)
    norm_rope_store(**far)
    read = {"layout": arguments["layout"], "block_size": 4, "backend": "ref"}
    want = gather_and_dequantize(arguments["kv_cache"], arguments["slot_mapping"], **read)
    assert torch.equal(gather_and_dequantize(far["kv_cache"], far["slot_mapping"], **read), want)
    assert (far["kv_cache"][:2] == 0).all()


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_describes_itself_to_pytorch(backend: str, device: str) -> None:
    arguments = _small(device)
    cos, sin = arguments["rotation"]
    inputs = (arguments["kv"], arguments["norm_weight"], cos, sin)
    name = NORM_ROPE_STORE.resolve(backend, arguments["kv"].device)
    for return_latent in (True, False):
        torch.library.opcheck(
            torch.ops.model1.norm_rope_store.default,
            (*inputs, arguments["kv_cache"], arguments["slot_mapping"],
             "model1_fp8", 64, 32, 4, 1e-6, 96, return_latent, name),
        )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_under_torch_compile(backend: str, device: str) -> None:
    arguments = _small(device) | {"backend": backend}

    def step(kv: Tensor, cache: Tensor) -> Tensor:
        return norm_rope_store(**(arguments | {"kv": 2 * kv, "kv_cache": cache})).sum(-1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    caches = [torch.zeros_like(arguments["kv_cache"]) for _ in range(2)]
    want, got = step(arguments["kv"], caches[0]), compiled(arguments["kv"], caches[1])
    assert torch.equal(got, want)
    assert torch.equal(*caches)
    assert (caches[0] != 0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv": torch.ones(4, 97)}, r"kv must be \[t, 96\], got \[4, 97\]"),
        ({"kv": torch.ones(4, 96).double()}, "kv must be bfloat16, float16 or float32, got .*64"),
        ({"norm_width": 65}, "norm_width must be 64 or 96, got 65"),
        ({"norm_weight": torch.ones(64)}, r"norm_weight must be \[96\] .*got \[64\]"),
        ({"norm_weight": torch.ones(96).int()}, r"norm_weight must be .* got \[96\] torch.int32"),
        ({"norm_weight": torch.ones(96, device="meta")}, "norm_weight must be on .*cpu, got meta"),
        (
            {"rotation": _angles(torch.arange(3), 32)},
            r"rotation.cos must be \[4, 32\] float32, got",
        ),
        ({"slot_mapping": torch.tensor([1, 2, 3, 12])}, "-1 or a slot below 12, got 12"),
        ({"backend": "cuda"}, "backend must be one of auto, ref, triton"),
    ],
)
def test_bad_arguments_name_value_and_rule(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, BackendUnavailable), match=message):
        norm_rope_store(**(_small("cpu") | change))


def test_pairs_need_an_even_number_of_channels() -> None:
    layout = KVLayout("fp32", 5, 3)
    arguments = _small("cpu") | {"layout": layout, "kv": torch.ones(4, 8), "norm_weight": None}
    arguments["kv_cache"] = allocate_kv_cache(3, 4, layout, "cpu")
    with pytest.raises(ValueError, match="d_rope must be even to rotate pairs, got 3"):
        norm_rope_store(**arguments)
