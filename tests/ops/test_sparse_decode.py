"""Sparse decode in plain PyTorch against a loop in fp64, and what its contract refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from backend_option import TESTED
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, naive_attention
from sparse_decode_cases import (
    Shape,
    assert_right,
    check_batch_invariance,
    make_arguments,
)
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.kv_cache import KVLayout, allocate_kv_cache, quantize_and_store
from model1.ops.sparse_decode import SPARSE_DECODE, sparse_decode

LAYOUT = KVLayout("model1_fp8", 64, 32)
LAYOUTS = [LAYOUT, KVLayout("v32_fp8", 128, 0), KVLayout("bf16", 5, 3), KVLayout("fp32", 7, 0)]


def _cache(layout: KVLayout, num_tokens: int, block_size: int) -> tuple[Tensor, Tensor]:
    """A full cache and its tokens [num_tokens, d], eighths that every layout holds exactly."""
    kv = torch.randint(-8, 9, (num_tokens, layout.d)) / 8
    cache = allocate_kv_cache(-(-num_tokens // block_size), block_size, layout, "cpu")
    quantize_and_store(kv, cache, torch.arange(num_tokens), layout=layout, block_size=block_size)
    return cache, kv


@given(
    layout=st.sampled_from(LAYOUTS),
    b=st.integers(0, 3),
    s_q=st.integers(1, 2),
    h=st.integers(1, 3),
    topks=st.tuples(st.integers(0, 6), st.integers(0, 4)),
    block_sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    has_length=st.booleans(),
    has_sink=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_float64_loop(
    layout: KVLayout, b: int, s_q: int, h: int, topks: tuple[int, int],
    block_sizes: tuple[int, int], has_length: bool, has_sink: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    q = torch.randn(b, s_q, h, layout.d)
    caches, tables = zip(*(_cache(layout, 20, size) for size in block_sizes), strict=True)
    slots = [torch.randint(-1, 20, (b, s_q, n), dtype=torch.int32) for n in topks]
    lengths = [torch.randint(n + 1, (b,), dtype=torch.int32) for n in topks]
    sink = torch.randn(h) if has_sink else None
    value_dim = int(torch.randint(1, layout.d + 1, ()))
    used = lengths if has_length else [None, None]
    out, lse = sparse_decode(
        q, caches[0], slots[0], topk_length=used[0], attn_sink=sink, layout=layout,
        block_size=block_sizes[0], extra_kv_cache=caches[1], extra_topk_indices=slots[1],
        extra_topk_length=used[1], extra_block_size=block_sizes[1], value_dim=value_dim,
        softmax_scale=0.3, backend=TESTED,
    )  # fmt: skip
    for i in range(b):
        kv = torch.cat(
            [table[s[i].clamp_min(0)] for table, s in zip(tables, slots, strict=True)], 1
        )
        counts = [int(n[i]) if has_length else 99 for n in lengths]
        visible = [
            (s[i] >= 0) & (torch.arange(s.shape[2]) < n) for s, n in zip(slots, counts, strict=True)
        ]
        want, want_lse = naive_attention(
            q[i], kv, torch.cat(visible, 1), value_dim=value_dim, scale=0.3, sink=sink
        )
        assert_near(out[i], want, 2e-5)
        assert_near(lse[i], want_lse, 2e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.name)
@pytest.mark.parametrize("extra_topk", [0, 9])
def test_hostile_calls_are_right(layout: KVLayout, extra_topk: int) -> None:
    shape = Shape(layout=layout, b=3, s_q=2, extra_topk=extra_topk, has_length=True, has_sink=True)
    arguments = make_arguments(shape)
    assert_right(sparse_decode(**arguments, backend=TESTED), arguments)


def test_a_flat_batch_is_one_query_per_request() -> None:
    arguments = make_arguments(Shape(layout=LAYOUT, b=4, extra_topk=7, has_length=True))
    out, lse = sparse_decode(**arguments, backend=TESTED)
    names = ("q", "topk_indices", "extra_topk_indices")
    flat = arguments | {name: arguments[name].squeeze(1) for name in names}
    got, got_lse = sparse_decode(**flat, backend=TESTED)
    assert torch.equal(got, out.squeeze(1))
    assert torch.equal(got_lse, lse.squeeze(1))


def test_requests_with_different_numbers_of_queries_are_one_flat_batch() -> None:
    """Each token is a row with the list and the length of its own."""
    one = make_arguments(Shape(layout=LAYOUT, b=1, s_q=3, topk=8))
    two = make_arguments(Shape(layout=LAYOUT, b=1, s_q=1, topk=8))
    two = one | {name: two[name] for name in ("q", "topk_indices")}  # another request's queries
    two["topk_indices"] = one["topk_indices"][:, 1:2].flip(-1)
    lengths = [6, 6, 6, 8]
    flat = one | {name: torch.cat([one[name][0], two[name][0]]) for name in ("q", "topk_indices")}
    flat["topk_length"] = torch.tensor(lengths, dtype=torch.int32, device=one["q"].device)
    out, lse = sparse_decode(**flat, backend=TESTED)
    row = 0
    for request in (one, two):
        for j in range(request["q"].shape[1]):
            alone = request | {name: request[name][:, j : j + 1] for name in ("q", "topk_indices")}
            alone["topk_length"] = flat["topk_length"][row : row + 1]
            want, want_lse = sparse_decode(**alone, backend=TESTED)
            assert_near(out[row], want[0, 0], 1e-6)
            assert_near(lse[row], want_lse[0, 0], 1e-6)
            row += 1


def test_a_selected_nan_comes_out() -> None:
    arguments = make_arguments(Shape(layout=LAYOUT, b=2, topk=6))
    unused = set(range(15)) - set(arguments["topk_indices"].flatten().tolist())
    arguments["topk_indices"][0, 0, 5] = unused.pop()
    out, lse = sparse_decode(**arguments, backend=TESTED)
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("wrong", [-(2**31), -7, 24, 28, 2**31 - 1])
@pytest.mark.parametrize("prefix", ["", "extra_"])
def test_slots_outside_their_cache_do_not_count(prefix: str, wrong: int) -> None:
    name = f"{prefix}topk_indices"
    arguments = make_arguments(Shape(layout=LAYOUT, b=2, topk=8, extra_topk=8))
    for scope in ("", "extra_"):  # as large as each other: 20 and 19 slots
        assert len(arguments[f"{scope}kv_cache"]) * arguments[f"{scope}block_size"] < 24
    slots = arguments[name]
    slots[0, 0, 3], slots[1, 0, 0] = -1, -1
    want = sparse_decode(**arguments, backend=TESTED)
    arguments[name] = slots.masked_fill(slots < 0, wrong)
    got = sparse_decode(**arguments, backend=TESTED)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.name)
@pytest.mark.parametrize("has_length", [False, True])
def test_deterministic_rows_know_neither_mates_nor_padding(
    layout: KVLayout, has_length: bool
) -> None:
    shape = Shape(layout=layout, b=4, s_q=2, topk=37, extra_topk=13, has_length=has_length)
    check_batch_invariance(
        make_arguments(replace(shape, has_sink=True)),
        lambda call: sparse_decode(**call, deterministic=True, backend=TESTED),
    )


def _valid_call() -> dict[str, Any]:
    return make_arguments(Shape(layout=LAYOUT, extra_topk=3, has_length=True, has_sink=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 96)}, r"q must be \[b, s_q, h, d\] or \[t, h, d\], got \[2, 96\]"),
        ({"q": torch.zeros(2, 1, 0, 96)}, r"got \[2, 1, 0, 96\]"),
        ({"q": torch.zeros(2, 1, 3, 96).double()}, "bfloat16, float16 or float32, got .*float64"),
        ({"q": torch.zeros(2, 1, 3, 95)}, "q must have the 96 channels of the cache, got 95"),
        ({"q": torch.zeros(2, 1, 3, 192)[..., ::2]}, "q must be contiguous along its last axis"),
        ({"value_dim": 97}, r"value_dim must be in 1\.\.96, got 97"),
        ({"value_dim": 0}, r"value_dim must be in 1\.\.96, got 0"),
        ({"attn_sink": torch.zeros(4)}, r"attn_sink must be \[3\] float32, got \[4\]"),
        ({"attn_sink": torch.zeros(3).half()}, r"attn_sink must be \[3\] float32, got .*float16"),
        ({"attn_sink": torch.zeros(6)[::2]}, "attn_sink must be contiguous, got stride 2"),
        ({"kv_cache": torch.zeros(4, 9)}, "kv_cache must be uint8, got torch.float32"),
        ({"extra_kv_cache": torch.zeros(4, 9).byte()}, "extra_kv_cache must be .*at least 136"),
        ({"topk_indices": torch.zeros(2, 2, 4).int()}, r"\[2, 1, topk\], got \[2, 2, 4\]"),
        ({"topk_indices": torch.zeros(2, 1, 4).long()}, "topk_indices must be int32, got .*int64"),
        ({"topk_indices": torch.zeros(2, 1, 8).int()[..., ::2]}, "contiguous along its last axis"),
        ({"topk_length": torch.zeros(3).int()}, r"topk_length must be \[2\] int32, got \[3\]"),
        ({"topk_length": torch.zeros(2)}, r"topk_length must be \[2\] int32, got .*float32"),
        (
            {"topk_length": torch.zeros(4).int()[::2]},
            "topk_length must be contiguous, got stride 2",
        ),
        (
            {"extra_topk_indices": torch.zeros(2, 1).int()},
            r"extra_topk_indices must be \[2, 1, top",
        ),
        ({"extra_topk_length": torch.zeros(5).int()}, r"extra_topk_length must be \[2\] int32"),
        ({"extra_kv_cache": None}, "extra_topk_length need extra_kv_cache"),
        ({"extra_topk_indices": None}, "extra_kv_cache needs extra_topk_indices"),
        ({"extra_block_size": None}, "extra_kv_cache needs .* and extra_block_size"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = _valid_call() | change
    arguments = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        sparse_decode(**arguments, backend=TESTED)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kv_cache", "topk_indices", "extra_topk_length", "attn_sink"])
def test_tensors_on_another_device_are_named(name: str) -> None:
    arguments = _valid_call()
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=f"{name} must be on q's device cuda:0, got cpu"):
        sparse_decode(**arguments)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"one of auto, ref, triton.*, got 'cuda'"):
        sparse_decode(**_valid_call(), backend="cuda")


@pytest.mark.built_in
def test_a_cpu_runs_the_reference() -> None:
    assert SPARSE_DECODE.resolve("auto", torch.device("cpu")) == "ref"


def test_opcheck_and_compile() -> None:
    cache, _ = _cache(LAYOUT, 24, 8)
    q, sink = torch.randn(2, 1, 3, 96), torch.randn(3)
    slots = torch.randint(-1, 24, (2, 1, 5), dtype=torch.int32)
    length = torch.tensor([2, 5], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.model1.sparse_decode,
        (
            q, cache, slots, length, cache, slots, None, sink, LAYOUT.name, LAYOUT.d_nope,
            LAYOUT.d_rope, 8, 8, 90, 0.1, math.inf, False, "ref",
        ),
    )  # fmt: skip

    def call(q: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_decode(
            q, cache, slots, topk_length=length, attn_sink=sink, layout=LAYOUT, block_size=8,
            value_dim=90, softmax_scale=0.1, backend=TESTED,
        )  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q, slots), call(q, slots), strict=True):
        assert torch.equal(got, want)


def test_it_is_not_differentiable() -> None:
    cache, _ = _cache(LAYOUT, 8, 8)
    q = torch.randn(2, 1, 3, 96, requires_grad=True)
    slots = torch.zeros(2, 1, 5, dtype=torch.int32)
    out, _ = sparse_decode(
        q,
        cache,
        slots,
        layout=LAYOUT,
        block_size=8,
        value_dim=96,
        softmax_scale=0.1,
        backend=TESTED,
    )
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
