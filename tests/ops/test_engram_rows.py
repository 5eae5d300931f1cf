"""Stored Engram rows: bytes, error bounds, and what a gather reads."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model1.ops.engram import RowStore, quantize_rows
from model1.ops.engram.rows import RowKind

KINDS: tuple[RowKind, ...] = get_args(RowKind)
# Relative error of the worst and of the mean row on Gaussian rows of 64 channels; measured
# 0.0023, 0.037, 0.080 and 0.0017, 0.0266, 0.0612 on 4096 rows.
WORST = {"bf16": 0.003, "fp8": 0.045, "fp4": 0.095}
MEAN = {"bf16": 0.0018, "fp8": 0.028, "fp4": 0.063}


def read_all(store: RowStore) -> Tensor:
    return store.gather(torch.arange(store.num_rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_gaussian_rows_survive_within_the_stated_error(kind: RowKind, scale: float) -> None:
    x = scale * torch.randn(2000, 64)
    found = read_all(quantize_rows(x, kind))
    error = (found - x).norm(dim=1) / x.norm(dim=1)
    assert error.max() < WORST[kind]
    assert ((found - x).norm() / x.norm()).item() < MEAN[kind]


@given(
    groups=st.integers(1, 3),
    exponents=st.lists(st.integers(-100, 100), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_fp8_error_per_channel(groups: int, exponents: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    # Channels of very different magnitude within one group as well.
    x = torch.randn(len(exponents), 32 * groups) * torch.randn(32 * groups).exp()
    x = x * 2.0 ** torch.tensor(exponents)[:, None]
    found = read_all(quantize_rows(x, "fp8"))
    largest = x.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    # Half a step of e4m3: 2^-4 of a normal value, 2^-10 of the scale, which is < largest / 224.
    assert ((found - x).abs() <= x.abs() / 16 + largest / 224 / 1024).all()


@given(exponents=st.lists(st.integers(-20, 6), min_size=1, max_size=6), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_fp4_error_per_group(exponents: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(len(exponents), 24) * 2 - 1
    x = x * 2.0 ** torch.tensor(exponents)[:, None]
    error = (read_all(quantize_rows(x, "fp4")) - x).unflatten(1, (-1, 8)).norm(dim=-1)
    largest = x.unflatten(1, (-1, 8)).abs().amax(-1)
    # The scale tried first is within 1/16 of the largest magnitude; no gap between levels
    # exceeds 0.18, so no channel is off by more than 0.09 of it. Below 2^-24: flushed to zero.
    bound = 8**0.5 * 0.09 * 17 / 16 * largest
    assert (error <= bound.clamp(min=8**0.5 * 2.0**-24)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [32, 64, 256])
def test_bytes(kind: RowKind, dim: int) -> None:
    store = quantize_rows(torch.randn(10, dim), kind)
    per_row = {"bf16": 2 * dim, "fp8": dim + dim // 32, "fp4": dim // 2 + dim // 8}[kind]
    assert store.nbytes == 10 * per_row
    assert (store.num_rows, store.dim, store.kind) == (10, dim, kind)
    assert kind != "fp4" or 3 * store.nbytes <= 10 * 2 * dim


def test_published_8_bit_row_is_264_bytes() -> None:
    assert quantize_rows(torch.randn(1, 256), "fp8").nbytes == 264


def test_fp8_golden_bytes() -> None:
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([448.0, -1.0, 2.0**-9, 0.3])
    store = quantize_rows(torch.cat([x, x * 2.0**-20, torch.zeros(1, 32)]), "fp8")
    codes = store.data.view(torch.uint8)
    # 448 is the largest code, 2^-9 the smallest, 0.3 rounds to 0.3125.
    assert codes[0, :5].tolist() == [0x7E, 0xB8, 0x01, 0x2A, 0x00]
    assert torch.equal(codes[1], codes[0])
    assert store.scale is not None
    assert store.scale.tolist()[:2] == [[127], [107]]
    expected = torch.tensor([448.0, -1.0, 2.0**-9, 0.3125])
    assert torch.equal(store.gather(torch.tensor([0]))[0, :4], expected)
    assert torch.equal(store.gather(torch.tensor([1]))[0, :4], expected * 2.0**-20)
    assert (store.gather(torch.tensor([2])) == 0).all()


def test_fp8_reads_every_code_and_scale_as_the_formats_say() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # the two NaN codes are never written
    codes = torch.cat([codes, codes[:2]]).view(torch.float8_e4m3fn)
    for byte in (0, 1, 100, 127, 200, 246):
        scale = torch.full((1, 8), byte, dtype=torch.uint8)
        found = RowStore("fp8", codes[None], scale).gather(torch.tensor([0]))[0]
        factor = 2.0 ** (byte - 127) if byte else 0.0
        assert torch.equal(found.double(), (codes.double() * factor).float().double())


def test_fp4_golden_bytes() -> None:
    levels = torch.tensor([-1.053, -0.059, 0.059, 1.053, 0.1795, -0.1795, 0.874, 0.306])
    store = quantize_rows(torch.stack([levels, 0.5 * levels, 0 * levels]), "fp4")
    # Low nibble first: level 0, then 7; 8, 15; 9, 6; 14, 10. Scale 1 is 2^(24 - 24).
    assert store.data.tolist()[:2] == [[0x70, 0xF8, 0x69, 0xAE]] * 2
    assert store.scale is not None
    assert store.scale.tolist() == [[192], [184], [0]]
    torch.testing.assert_close(read_all(store)[0], levels, rtol=0, atol=1e-7)
    assert (read_all(store)[2] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gather_reads_only_the_rows_asked_for(kind: RowKind) -> None:
    x = torch.randn(50, 64)
    store = quantize_rows(x, kind)
    full = read_all(store)
    wanted = torch.tensor([[3, 3, 49], [0, 7, 3]])
    others = torch.ones(50, dtype=torch.bool)
    others[wanted.flatten()] = False
    store.data.view(torch.uint8)[others] = 0xFF
    if store.scale is not None:
        store.scale[others] = 0xFF
    found = store.gather(wanted)
    assert found.dtype == torch.float32
    assert torch.equal(found, full[wanted])
    assert torch.equal(store.gather(wanted.t()), full[wanted.t()])


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_rows_and_tokens_are_bitwise_permuted(kind: RowKind) -> None:
    x = torch.randn(40, 32)
    order = torch.randperm(40)
    full = read_all(quantize_rows(x, kind))
    assert torch.equal(quantize_rows(x, kind).gather(order), full[order])
    assert torch.equal(read_all(quantize_rows(x[order], kind)), full[order])


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_storing_twice_changes_nothing(kind: RowKind) -> None:
    once = read_all(quantize_rows(torch.randn(30, 64), kind))
    assert torch.equal(read_all(quantize_rows(once, kind)), once)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_and_no_rows(kind: RowKind) -> None:
    store = quantize_rows(torch.randn(4, 32), kind)
    assert store.gather(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 32)
    empty = quantize_rows(torch.zeros(0, 32), kind)
    assert (empty.num_rows, empty.dim, empty.nbytes) == (0, 32, 0)
    assert empty.gather(torch.zeros(0, dtype=torch.int64)).shape == (0, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_show(kind: RowKind, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(23, 32)
    whole = quantize_rows(x, kind).to_tensors()
    monkeypatch.setattr("model1.ops.engram.rows._CHUNK_ROWS", 7)
    for name, tensor in quantize_rows(x, kind).to_tensors().items():
        assert torch.equal(tensor.view(torch.uint8), whole[name].view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_store_reads_back_bitwise(kind: RowKind, tmp_path: Path) -> None:
    store = quantize_rows(torch.randn(12, 64, dtype=torch.bfloat16), kind)
    save_file(store.to_tensors(), tmp_path / "rows.safetensors")
    again = RowStore.from_tensors(load_file(tmp_path / "rows.safetensors"))
    assert again.kind == kind
    assert torch.equal(read_all(again), read_all(store))
    assert torch.equal(read_all(again.to("cpu")), read_all(store))


def test_bad_rows_are_named() -> None:
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'int4'"):
        quantize_rows(x, "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive multiple of 32 for fp8, got 48"):
        quantize_rows(x[:, :48], "fp8")
    with pytest.raises(ValueError, match="positive multiple of 8 for fp4, got 63"):
        quantize_rows(x[:, :63], "fp4")
    with pytest.raises(ValueError, match="positive multiple of 1 for bf16, got 0"):
        quantize_rows(x[:, :0], "bf16")
    with pytest.raises(ValueError, match=r"must be \[rows, dim\] floating point, got \(64,\)"):
        quantize_rows(x[0], "bf16")
    with pytest.raises(ValueError, match=r"floating point, got .* torch\.int64"):
        quantize_rows(x.long(), "bf16")
    for kind, value in (("fp8", 2e38), ("fp4", 241.0), ("bf16", 3.4e38)):
        x[1, 1] = value
        with pytest.raises(ValueError, match=f"{kind} rows must be within"):
            quantize_rows(x, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_must_be_finite(kind: RowKind, value: float) -> None:
    x = torch.randn(3, 64)
    x[2, 5] = value
    with pytest.raises(ValueError, match=f"{kind} rows must be within"):
        quantize_rows(x, kind)


def test_the_largest_magnitudes_survive() -> None:
    limits = {"bf16": torch.finfo(torch.bfloat16).max, "fp8": 2.0**127, "fp4": 240.0}
    for kind in KINDS:
        found = read_all(quantize_rows(torch.full((1, 32), -limits[kind]), kind))
        assert (found / -limits[kind] - 1).abs().max() < 0.07


def test_bad_gathers_and_tensors_are_named() -> None:
    store = quantize_rows(torch.randn(3, 64), "fp8")
    tensors = store.to_tensors()
    with pytest.raises(ValueError, match=r"rows must be int64, got torch\.int32"):
        store.gather(torch.zeros(1, dtype=torch.int32))
    for row in (3, -1):
        with pytest.raises(IndexError):
            store.gather(torch.tensor([row]))
    with pytest.raises(ValueError, match="keys must be data and scale, got"):
        RowStore.from_tensors({**tensors, "bias": tensors["scale"]})
    with pytest.raises(ValueError, match="data must be"):
        RowStore.from_tensors({**tensors, "data": torch.zeros(3, 64)})
    with pytest.raises(ValueError, match=r"fp8 row store scale must be \(3, 2\) uint8, got none"):
        RowStore.from_tensors({"data": tensors["data"]})
    with pytest.raises(ValueError, match="multiple of 32 columns, got 63"):
        RowStore.from_tensors({**tensors, "data": tensors["data"][:, :63]})
    with pytest.raises(ValueError, match="bf16 row store must have no scale"):
        RowStore.from_tensors({**tensors, "data": torch.zeros(3, 64, dtype=torch.bfloat16)})
