"""Engram's gather and hash in Triton: every code, hostile rows and ids, golden rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engram_cases import DEVICE, LARGE, far
from torch import Tensor

from model1.config import EngramConfig
from model1.ops.engram import RowStore, build_hash_specs, engram_hash, quantize_rows
from model1.ops.engram.gather import gather_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = pytest.mark.any_device
KINDS: list[Any] = ["bf16", "fp8", "fp4"]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gathered_rows_are_bitwise_the_references(kind: Any, dtype: torch.dtype) -> None:
    for dim, shape in ((32, (3, 5)), (96, (1,)), (256, (37,)), (64, (0, 3))):
        store = quantize_rows(torch.randn(23, dim), kind)
        rows = torch.randint(23, shape)
        want = store.gather(rows, dtype=dtype)
        got = store.to(DEVICE).gather(rows.to(DEVICE), dtype=dtype, backend="triton")
        assert (got.dtype, got.shape) == (dtype, (*shape, dim))
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dim", [1, 5, 33])
def test_bf16_rows_have_any_width(dim: int) -> None:
    store = quantize_rows(torch.randn(9, dim), "bf16").to(DEVICE)
    rows = torch.tensor([8, 0, 3, 3]).to(DEVICE)
    assert torch.equal(store.gather(rows, backend="triton"), store.data[rows].float())


@pytest.mark.parametrize("first", range(0, 256, 64))
def test_every_8_bit_code_under_every_scale(first: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1).view(torch.float8_e4m3fn)
    scale = torch.arange(first, first + 64, dtype=torch.uint8)[:, None].repeat(1, 8)
    store, rows = RowStore("fp8", codes, scale), torch.arange(64)
    want = store.gather(rows)
    got = store.to(DEVICE).gather(rows.to(DEVICE), backend="triton").cpu()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(
        got.nan_to_num(7.0).view(torch.int32), want.nan_to_num(7.0).view(torch.int32)
    )


def test_every_4_bit_byte_under_every_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 64)
    store, rows = RowStore("fp4", codes, scale), torch.arange(256)
    got = store.to(DEVICE).gather(rows.to(DEVICE), backend="triton").cpu()
    assert torch.equal(got, store.gather(rows))


@EVERY_KIND
def test_rows_outside_the_table_are_nan_and_nothing_else_is_read(kind: Any) -> None:
    store = quantize_rows(torch.randn(50, 64), kind)
    wanted = torch.tensor([3, -1, 49, 50, 0, 2**62, -(2**62), 3])
    good = (wanted >= 0) & (wanted < 50)
    want = store.gather(wanted[good])
    others = torch.ones(50, dtype=torch.bool)
    others[wanted[good]] = False
    store.data.view(torch.uint8)[others] = 0xFF
    if store.scale is not None:
        store.scale[others] = 0xFF
    store = store.to(DEVICE)
    got = store.gather(wanted.to(DEVICE), backend="triton").cpu()
    assert torch.equal(got[good], want)
    assert got[~good].isnan().all()
    empty = quantize_rows(torch.zeros(0, 64), kind).to(DEVICE)
    assert empty.gather(wanted.to(DEVICE), backend="triton").isnan().all()


@EVERY_KIND
def test_rows_may_lie_apart(kind: Any) -> None:
    store = quantize_rows(torch.randn(20, 64), kind).to(DEVICE)
    scale = None if store.scale is None else store.scale[1::2]
    rows = torch.arange(30).to(DEVICE)[2:20:2] // 2
    got = gather_rows(store.data[1::2], scale, rows, backend="triton")
    assert torch.equal(got, store.gather(2 * rows + 1, backend="triton"))


def hash_arguments(t: int, config: EngramConfig = LARGE, layer: int = 1) -> tuple[Tensor, ...]:
    spec = build_hash_specs(config)[layer]
    size = config.engram_compressed_vocab_size
    ids = torch.randint(-2, size, (t, config.engram_max_ngram_size))
    constants = (spec.multipliers, spec.table_sizes, spec.table_offsets)
    tensors = (ids, torch.randperm(size), *map(torch.from_numpy, constants))
    return tuple(x.to(DEVICE) for x in tensors)


def test_golden_rows() -> None:
    """Frozen: a change here makes every trained table useless."""
    ids = torch.tensor([[7, 5, 3, 2], [0, 0, 0, 0], [99_091, 99_091, 99_091, 99_091]]).to(DEVICE)
    constants = hash_arguments(0)[2:]
    table = torch.arange(99_092).to(DEVICE)
    rows = engram_hash(ids, table, *constants, pad_token_id=2, backend="triton").cpu()
    assert rows[1].tolist() == constants[2].tolist()
    assert rows[0, [0, 8, 23]].tolist() == [1_465_117, 130_348_112, 382_554_457]
    assert rows[2, [0, 8, 23]].tolist() == [12_193_612, 132_502_226, 375_130_424]


@pytest.mark.parametrize("t", [0, 1, 33])
@pytest.mark.parametrize("places", [2, 3, 4])
def test_hash_equals_the_reference(places: int, t: int) -> None:
    config = dataclasses.replace(LARGE, engram_max_ngram_size=places, engram_n_heads=1 + places)
    arguments = hash_arguments(t, config, 14)
    arguments[0][:, 1:][torch.rand(t, places - 1) < 0.3] = -1  # gaps, latched from there on
    want = engram_hash(*arguments, pad_token_id=2, backend="ref")
    assert torch.equal(engram_hash(*arguments, pad_token_id=2, backend="triton"), want)
    strided = arguments[0].T.contiguous().T
    got = engram_hash(strided, *arguments[1:], pad_token_id=2, backend="triton")
    assert torch.equal(got, want)


def test_hash_has_the_remainder_of_pytorch_for_any_integers() -> None:
    ids = torch.randint(0, 30, (40, 3)).to(DEVICE)
    table = torch.randint(-(2**62), 2**62, (30,)).to(DEVICE)
    multipliers = torch.randint(-(2**62), 2**62, (3,)).to(DEVICE)
    sizes = torch.tensor([7, -7, 2**40, -(2**40) + 1, 1, 2**62]).to(DEVICE)
    arguments = (ids, table, multipliers, sizes, sizes * 0 + 5)
    want = engram_hash(*arguments, pad_token_id=2, backend="ref")
    assert torch.equal(engram_hash(*arguments, pad_token_id=2, backend="triton"), want)


def test_ids_beyond_the_vocabulary_have_no_rows() -> None:
    arguments = hash_arguments(5)
    ids = arguments[0].abs()
    ids[1, 2], ids[3, 0], ids[4, 1] = 99_092, 2**62, -1
    rows = engram_hash(ids, *arguments[1:], pad_token_id=2, backend="triton")
    bad = torch.zeros(5, 24, dtype=torch.bool)
    bad[1, 8:], bad[3] = True, True
    assert torch.equal(rows.cpu() == -1, bad)
    others = engram_hash(ids[[0, 2, 4]], *arguments[1:], pad_token_id=2, backend="ref")
    assert torch.equal(rows[[0, 2, 4]], others)


def test_rows_beyond_32_bits() -> None:
    store = quantize_rows(torch.randn(3, 64), "fp8")
    data = far(store.data.view(torch.uint8).to(DEVICE), (2**30 + 16, 1)).view(torch.float8_e4m3fn)
    scale = None if store.scale is None else store.scale.to(DEVICE)
    rows = torch.tensor([2, 0, 1])
    got = gather_rows(data, scale, rows.to(DEVICE), backend="triton")
    assert torch.equal(got.cpu(), store.gather(rows))


def test_the_operators_describe_themselves_to_pytorch() -> None:
    store, rows = quantize_rows(torch.randn(5, 32), "fp4").to(DEVICE), torch.arange(3).to(DEVICE)
    gather = torch.ops.model1.engram_gather.default
    torch.library.opcheck(gather, (store.data, store.scale, rows, torch.bfloat16, "triton"))
    hash_op = torch.ops.model1.engram_hash.default
    torch.library.opcheck(hash_op, (*hash_arguments(4)[:5], 2, "triton"))


def test_bad_arguments_name_value_and_rule() -> None:
    store, rows = quantize_rows(torch.randn(3, 64), "fp8").to(DEVICE), torch.zeros(1).long()
    with pytest.raises(ValueError, match=f"rows must be on {store.data.device}, got meta"):
        store.gather(rows.to("meta"), backend="triton")
    with pytest.raises(ValueError, match=r"dtype must be float32, .*got torch\.int64"):
        store.gather(rows.to(DEVICE), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"data must have contiguous rows, got strides \(1, 64\)"):
        gather_rows(store.data.T, None, rows.to(DEVICE), backend="triton")
    arguments = list(hash_arguments(2))
    arguments[3] = arguments[3].to("meta")
    with pytest.raises(ValueError, match=f"table_sizes must be on {store.data.device}, got meta"):
        engram_hash(*arguments, pad_token_id=2, backend="triton")
