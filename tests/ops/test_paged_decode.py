"""Paged decode, its contract and oracle: loops in fp64, hostile memory, invariances, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, naive_attention
from paged_decode_cases import GARBAGE_BLOCK, Shape, attend, check, random_case
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.kv_cache import KVLayout, allocate_kv_cache, quantize_and_store
from model1.ops.paged_decode import paged_decode

INF = math.inf
MODEL1 = KVLayout("model1_fp8", 64, 16)
V32 = KVLayout("v32_fp8", 128, 16)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    s_q=st.integers(1, 3),
    hkv=st.integers(1, 2),
    group=st.integers(1, 2),
    d=st.integers(1, 6),
    block_size=st.integers(1, 5),
    causal=st.booleans(),
    has_sink=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_float64_loop(
    lengths: list[int], s_q: int, hkv: int, group: int, d: int, block_size: int, causal: bool,
    has_sink: bool, seed: int,
) -> None:  # fmt: skip
    shape = Shape(
        h=hkv * group, hkv=hkv, d=d, value_dim=1 + seed % d, block_size=block_size, causal=causal,
        has_sink=has_sink,
    )  # fmt: skip
    case = random_case(shape, lengths, [s_q] * len(lengths), seed)
    out, lse = paged_decode(**case.arguments())
    options = {"value_dim": shape.value_dim, "scale": d**-0.5}
    sink = case.options["attn_sink"]
    for i, n in enumerate(lengths):
        ends = torch.tensor([n - (s_q - 1 - j) if causal else n for j in range(s_q)])
        visible = torch.arange(n) < ends[:, None]
        for head in range(shape.h):
            want = naive_attention(
                case.q[i, :, head : head + 1], case.keys[i][:, head // group], visible,
                sink=None if sink is None else sink[head : head + 1].clamp(-50, 50), **options,
            )  # fmt: skip
            assert_near(out[i, :, head], want[0][:, 0], 2e-5)
            assert_near(
                lse[i, :, head], want[1][:, 0].masked_fill(want[1][:, 0] == -INF, INF), 2e-5
            )


@pytest.mark.parametrize("layout", [MODEL1, V32, KVLayout("bf16", 20, 4), KVLayout("fp32", 5, 2)])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_reads_every_cache_layout(layout: KVLayout, block_size: int) -> None:
    shape = Shape(h=3, d=layout.d, value_dim=layout.d_nope, block_size=block_size, layout=layout)
    case = random_case(shape, [15, 1, 0, 17], [2] * 4, 0)
    check(case, paged_decode(**case.arguments()), layout.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_loses_only_rounding(dtype: torch.dtype) -> None:
    shape = Shape(h=6, hkv=2, d=32, value_dim=32, block_size=4, dtype=dtype, causal=True)
    case = random_case(shape, [33, 5], [3, 3], 0)
    check(case, paged_decode(**case.arguments()), str(dtype))


def test_ragged_queries_are_the_requests_one_by_one() -> None:
    shape = Shape(h=4, hkv=2, d=8, value_dim=6, block_size=3, causal=True, has_sink=True)
    lengths, q_lengths = [7, 0, 12, 5], [2, 3, 0, 4]
    case = random_case(shape, lengths, q_lengths, 0, ragged=True)
    out, lse = paged_decode(**case.arguments())
    check(case, (out, lse), "ragged")
    arguments = case.arguments()
    del arguments["cu_seqlens_q"], arguments["max_seqlen_q"]
    for i, rows in enumerate(case.query_rows):
        if q_lengths[i] == 0:
            continue
        alone = {"q": case.q[rows][None], "block_table": case.block_table[i : i + 1]}
        alone["cache_seqlens"] = case.cache_seqlens[i : i + 1]
        want = paged_decode(**(arguments | alone))
        assert_near(out[rows], want[0][0], 1e-6)
        assert_near(lse[rows], want[1][0], 1e-6)


def test_no_queries_and_no_requests() -> None:
    shape = Shape(h=2, d=8, value_dim=8, block_size=4)
    case = random_case(shape, [5, 3], [0, 0], 0, ragged=True)
    out, lse = paged_decode(**case.arguments())
    assert (out.shape, lse.shape) == ((0, 2, 8), (0, 2))
    arguments = random_case(shape, [5], [1], 0).arguments()
    none = {name: arguments[name][:0] for name in ("q", "block_table", "cache_seqlens")}
    out, lse = paged_decode(**(arguments | none))
    assert (out.shape, lse.shape) == ((0, 1, 2, 8), (0, 1, 2))


def test_keys_past_the_table_do_not_exist() -> None:
    case = random_case(Shape(h=2, d=8, value_dim=8, block_size=4), [8], [1], 0)
    arguments = case.arguments()
    want = paged_decode(**arguments)
    narrow = {
        "block_table": case.block_table[:, :2],
        "cache_seqlens": torch.tensor([9], dtype=torch.int32),
    }
    for got, expected in zip(paged_decode(**(arguments | narrow)), want, strict=True):
        assert torch.equal(got, expected)


def test_a_nan_that_is_seen_comes_out() -> None:
    case = random_case(Shape(h=2, d=8, value_dim=8, block_size=4), [8, 8], [1, 1], 0)
    case.kv_cache[case.block_table[1, 1], 2] = math.nan
    out, lse = paged_decode(**case.arguments())
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    assert out[0].isfinite().all()


def test_the_sink_is_a_factor_and_stays_out_of_lse() -> None:
    case = random_case(Shape(h=3, d=8, value_dim=8, block_size=4), [6, 0], [1, 1], 0)
    arguments = case.arguments()
    plain, lse = paged_decode(**arguments)
    sink = torch.tensor([0.3, INF, -INF])
    out, same_lse = paged_decode(**(arguments | {"attn_sink": sink}))
    assert torch.equal(lse, same_lse)
    factor = torch.sigmoid(lse - sink)[..., None].nan_to_num(nan=0.0)
    assert_near(out, plain * factor, 1e-6)
    assert not out[0, 0, 1].any()
    assert torch.equal(out[0, 0, 2], plain[0, 0, 2])


def test_permuting_the_batch_permutes_every_bit() -> None:
    case = random_case(Shape(h=3, d=16, value_dim=12, block_size=4), [9, 0, 21, 4], [2] * 4, 0)
    arguments, order = case.arguments(), torch.tensor([2, 0, 3, 1])
    want = paged_decode(**arguments)
    for name in ("q", "block_table", "cache_seqlens"):
        arguments[name] = arguments[name][order]
    for got, expected in zip(paged_decode(**arguments), want, strict=True):
        assert torch.equal(got, expected[order])


def test_the_cases_agree_with_themselves() -> None:
    # the fp64 formula that all kernels are held to, against one softmax over everything
    case = random_case(Shape(h=2, d=4, value_dim=4, block_size=4), [5], [1], 0)
    out, lse = attend(case, torch.float64)
    scores = torch.einsum("hd,sd->hs", case.q[0, 0].double(), case.keys[0][:, 0].double()) / 2
    assert_near(out[0, 0], scores.softmax(-1) @ case.keys[0][:, 0].double(), 1e-12)
    assert_near(lse[0, 0], scores.logsumexp(-1), 1e-12)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_op_describes_itself_to_pytorch(ragged: bool) -> None:
    case = random_case(Shape(h=2, d=8, value_dim=6, block_size=4), [5, 3], [2, 2], 0, ragged=ragged)
    a = case.arguments()
    torch.library.opcheck(
        torch.ops.model1.paged_decode.default,
        (
            a["q"], a["kv_cache"], a["block_table"], a["cache_seqlens"], a.get("cu_seqlens_q"),
            None, None, 0, 0, 4, a.get("max_seqlen_q", 0), 6, 0.3, True, INF, False, "ref",
        ),
    )  # fmt: skip


def test_one_graph_under_torch_compile() -> None:
    case = random_case(Shape(h=2, d=8, value_dim=6, block_size=4), [5, 3], [1, 1], 0)
    arguments = case.arguments()
    q = arguments.pop("q")

    def step(q: Tensor) -> Tensor:
        out, lse = paged_decode(2 * q, **arguments)
        return out.sum(-1) + lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), step(q))


def _good() -> dict[str, Any]:
    return {
        "q": torch.zeros(2, 1, 4, 8), "kv_cache": torch.zeros(3, 4, 2, 8),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "cache_seqlens": torch.ones(2, dtype=torch.int32), "value_dim": 8, "softmax_scale": 1.0,
    }  # fmt: skip


def _sums(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


RAGGED = {"q": torch.zeros(2, 4, 8), "cu_seqlens_q": _sums(0, 1, 2)}
PACKED = {"kv_cache": allocate_kv_cache(3, 4, MODEL1, "cpu"), "layout": MODEL1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 1, 4, 8).double()}, "q must be bfloat16, .* got torch.float64"),
        ({"q": torch.zeros(2, 4, 8)}, r"q must be \[b, s_q, h, d\], got \[2, 4, 8\]"),
        ({"q": torch.zeros(2, 0, 4, 8)}, r"q must be .* got \[2, 0, 4, 8\]"),
        ({"q": torch.zeros(2, 1, 8, 4).mT}, "q must be contiguous along its last axis"),
        ({"q": torch.zeros(2, 1, 3, 8)}, "h must be a multiple of hkv, got 3 and 2"),
        ({"q": torch.zeros(2, 1, 4, 6)}, r"kv_cache must be \[num_blocks, block_size, hkv, 6\]"),
        ({"kv_cache": torch.zeros(3, 4, 2, 8).half()}, "must have q's dtype torch.float32, got"),
        ({"kv_cache": torch.zeros(3, 4, 8, 2).mT}, "kv_cache must be contiguous along"),
        ({"block_size": 5}, "block_size must be the cache's 4, got 5"),
        ({"block_table": torch.zeros(2, 3)}, r"block_table must be \[2, max_blocks\] int32"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32).T}, "block_table must be contiguous"),
        ({"cache_seqlens": torch.ones(3, dtype=torch.int32)}, r"cache_seqlens must be .*\[2\]"),
        ({"cache_seqlens": torch.ones(2)}, r"cache_seqlens must be .* got \[2\] torch.float32"),
        ({"value_dim": 9}, r"value_dim must be in 1\.\.8, got 9"),
        ({"attn_sink": torch.zeros(3)}, r"attn_sink must be contiguous \[4\] float32, got \[3\]"),
        ({"max_seqlen_q": 1}, "max_seqlen_q needs cu_seqlens_q"),
        ({**RAGGED, "max_seqlen_q": 0}, "max_seqlen_q of at least 1, got 0"),
        ({**RAGGED, "max_seqlen_q": 1, "q": torch.zeros(2, 1, 4, 8)}, r"q must be \[t, h, d\]"),
        ({**RAGGED, "max_seqlen_q": 1, "cu_seqlens_q": RAGGED["cu_seqlens_q"][1:]}, r"\[3\] int32"),
        ({**RAGGED, "max_seqlen_q": 1, "cu_seqlens_q": _sums(0, 2, 5)}, "from 0 to at most 2, got"),
        ({**RAGGED, "max_seqlen_q": 2, "cu_seqlens_q": _sums(0, 2, 1)}, r"not fall .*\[0, 2, 1\]"),
        ({**RAGGED, "max_seqlen_q": 2, "cu_seqlens_q": _sums(1, 1, 2)}, "must not fall and go"),
        ({**RAGGED, "max_seqlen_q": 1, "cu_seqlens_q": _sums(0, 2, 2)}, "1, but a request has 2"),
        ({"layout": MODEL1}, "layout needs block_size"),
        ({**PACKED, "block_size": 4}, "q must have the 80 channels of the cache, got 8"),
        ({**PACKED, "block_size": 5}, "kv_cache must be .* blocks of 5 tokens"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    paged_decode(**_good())
    with pytest.raises(ValueError, match=message):
        paged_decode(**{**_good(), **change})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wrong", [GARBAGE_BLOCK, 3, -1, -7])
def test_a_block_that_counts_and_lies_outside_the_cache_is_an_error(
    wrong: int, packed: bool
) -> None:
    table = torch.tensor([[0, wrong, 1], [1, 2, 0]], dtype=torch.int32)
    options = {**PACKED, "block_size": 4, "q": torch.zeros(2, 1, 4, 80)} if packed else {}
    arguments = {**_good(), **options, "block_table": table}
    arguments["cache_seqlens"] = torch.tensor([4, 9], dtype=torch.int32)
    paged_decode(**arguments)  # past the end of the first request
    arguments["cache_seqlens"] = torch.tensor([5, 9], dtype=torch.int32)
    message = rf"block_table must hold ids in 0\.\.2 where a request has tokens, got {wrong}$"
    with pytest.raises(ValueError, match=message):
        paged_decode(**arguments)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="backend must be one of"):
        paged_decode(**_good(), backend="cuda")


@pytest.mark.parametrize("layout", [KVLayout("fp32", 24, 8), KVLayout("bf16", 24, 8), MODEL1])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_blocks_that_follow_each_other_are_read_as_any_others(
    layout: KVLayout, num_queries: int
) -> None:
    """A single request's tokens in one piece, with NaN before and after them."""
    cache = allocate_kv_cache(8, 4, layout, "cpu").fill_(0xFF)
    keys, q = torch.randn(10, layout.d), torch.randn(num_queries, 2, layout.d)
    options: dict[str, Any] = {"layout": layout, "block_size": 4}
    tables, outs = ([2, 3, 4], [6, 1, 7]), []
    for blocks in tables:
        slots = torch.tensor([blocks[i // 4] * 4 + i % 4 for i in range(10)])
        quantize_and_store(keys, cache, slots, **options)
        outs.append(
            paged_decode(
                q, cache, torch.tensor([blocks], dtype=torch.int32),
                torch.tensor([10], dtype=torch.int32), value_dim=layout.d_nope, softmax_scale=0.3,
                causal=True, cu_seqlens_q=torch.tensor([0, num_queries], dtype=torch.int32),
                max_seqlen_q=num_queries, **options,
            )
        )  # fmt: skip
    before = cache.clone()
    for one_piece, pieces in zip(*outs, strict=True):
        assert one_piece.isfinite().all()
        assert torch.equal(one_piece, pieces)
    assert torch.equal(cache, before)
