"""Selectors, remainder and sparse attention in plain PyTorch, and what their contracts refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend_option import TESTED
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import (
    CHOICE,
    SCAN,
    Shape,
    assert_good_choice,
    attention_expected,
    every_key,
    make_arguments,
    rest_expected,
    store_projections,
)
from sparse_decode_cases import store
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.kv_cache import KVLayout, allocate_kv_cache
from model1.ops.lowrank_attention import lowrank_attention
from model1.ops.lowrank_remainder import lowrank_remainder
from model1.ops.selector import lowrank_topk
from model1.ops.selector import ref as selector_ref
from model1.ops.selector.ref import request_rows, request_slots
from model1.testing.compare import assert_close_rows

LAYOUTS = [
    KVLayout("model1_fp8", 64, 32),
    KVLayout("v32_fp8", 128, 8),
    KVLayout("bf16", 20, 4),
    KVLayout("fp32", 24, 2),
]


def scan_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `lowrank_topk` takes, with queries that are rounded once."""
    q, basis = arguments["q"].double(), arguments["basis"].double()
    d_nope = basis.shape[1]
    scan_q = torch.cat([q[..., :d_nope] @ basis.T, q[..., d_nope:]], -1)
    scan_q = (scan_q * arguments["softmax_scale"]).to(arguments["q"].dtype)
    return {n: arguments[n] for n in SCAN if n != "scan_q"} | {"scan_q": scan_q}


def rest_of(scan: dict[str, Any], core: Tensor, rotary: bool) -> dict[str, Any]:
    rest = {name: x for name, x in scan.items() if name not in CHOICE}
    return rest | {"core_indices": core, "rotary_value": rotary}


def arguments_of(**options: Any) -> dict[str, Any]:
    arguments = make_arguments(Shape(**({"layout": LAYOUTS[0]} | options)), dtype=torch.float32)
    return {n: x.cpu() if isinstance(x, Tensor) else x for n, x in arguments.items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the reference's tests run on the CPU")
@given(
    layout=st.sampled_from(LAYOUTS),
    query_lens=st.lists(st.integers(0, 3), max_size=3),
    max_seqlen=st.integers(1, 30),
    h=st.integers(1, 3),
    r=st.integers(1, 20),
    block_size=st.integers(1, 9),
    topk=st.integers(1, 20),
    flags=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_equals_a_float64_loop(
    layout: KVLayout, query_lens: list[int], max_seqlen: int, h: int, r: int, block_size: int,
    topk: int, flags: tuple[bool, bool], seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    arguments = arguments_of(
        layout=layout, query_lens=tuple(query_lens), max_seqlen=max_seqlen, h=h, r=r,
        block_size=block_size, topk=topk, window=min(topk, 2), rotary_value=flags[0],
        has_sink=flags[1],
    )  # fmt: skip
    scan = scan_of(arguments)
    chosen, lse = lowrank_topk(**scan, backend=TESTED)
    assert_good_choice(chosen, lse, scan)
    out, lse = lowrank_remainder(**rest_of(scan, chosen, flags[0]), backend=TESTED)
    want, _, want_lse, _ = rest_expected(scan, chosen, flags[0])
    assert_close_rows(out, want, want)
    assert_close_rows(lse[..., None], want_lse[..., None], want_lse[..., None])
    out, lse = lowrank_attention(**arguments, backend=TESTED)
    want, want_lse, _ = attention_expected(arguments, chosen, is_baseline=False)
    assert_close_rows(out, want, want)
    assert_close_rows(lse[..., None], want_lse[..., None], want_lse[..., None])


def test_a_full_core_and_a_full_rank_are_dense_attention() -> None:
    arguments = arguments_of(
        layout=KVLayout("fp32", 24, 8), r=24, query_lens=(3, 1), topk=40, window=2
    )
    store_projections(arguments)
    dense, dense_lse, _ = attention_expected(arguments, every_key(arguments), is_baseline=False)
    for count in (40, 2):
        arguments["core_count"].fill_(count)
        out, lse = lowrank_attention(**arguments, backend=TESTED)
        assert_close_rows(out, dense, dense, eps=1e-4)
        assert_close_rows(lse[..., None], dense_lse[..., None], dense_lse[..., None], eps=1e-4)


def test_chunks_of_rows_follow_heads_and_keys() -> None:
    sums = torch.tensor([0, 70, 70, 73, 75], dtype=torch.int32)
    key_end = torch.cat([torch.arange(-2, 68), torch.tensor([131072, 9, 65536, 0, -1])]).int()
    few = [(slice(0, 64), 61), (slice(64, 70), 67)]
    one_each = [(slice(70, 71), 131072), (slice(71, 72), 9), (slice(72, 73), 65536)]
    got = list(request_rows(sums, key_end, 128))
    assert got == [(0, 67, few), (2, 131072, one_each)]
    two = [(slice(70, 72), 131072), (slice(72, 73), 65536)]
    assert list(request_rows(sums, key_end, 64))[1] == (2, 131072, two)


def test_rows_in_smaller_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(query_lens=(5, 2))
    want = lowrank_attention(**arguments, backend="ref")
    monkeypatch.setattr(selector_ref, "SCORES_BYTES", 1)
    got = lowrank_attention(**arguments, backend="ref")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_later_tokens_change_no_bit_of_a_row() -> None:
    arguments = arguments_of(query_lens=(1,))
    arguments["key_end"].fill_(20)
    arguments["block_table"].copy_(torch.randperm(10)[None])
    store(arguments["kv_cache"], torch.arange(40), LAYOUTS[0], 4)
    arguments["index_cache"].normal_()
    want = lowrank_attention(**arguments, backend=TESTED)
    late = request_slots(arguments["block_table"], 0, 40, 4)[20:]
    arguments["index_cache"][late] = math.nan
    got = lowrank_attention(**arguments, backend=TESTED)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_sink_takes_weight_and_stays_out_of_lse() -> None:
    arguments = arguments_of(query_lens=(2,))
    arguments["key_end"].fill_(0)  # nothing else to see
    sink = torch.tensor([math.inf, -math.inf, 0.0])
    out, lse = lowrank_attention(**(arguments | {"attn_sink": sink}), backend=TESTED)
    assert not out.any()
    assert lse.isneginf().all()
    arguments = arguments_of(query_lens=(2,))
    plain, plain_lse = lowrank_attention(**arguments, backend=TESTED)
    out, lse = lowrank_attention(**(arguments | {"attn_sink": sink}), backend=TESTED)
    assert torch.equal(lse, plain_lse)
    factor = torch.sigmoid(lse - sink).nan_to_num(0.0)[..., None]  # rows without keys
    assert torch.allclose(out, plain * factor, atol=1e-6)


def test_opcheck_and_compile() -> None:
    arguments = arguments_of(query_lens=(1, 1), max_seqlen=9, h=1)
    # opcheck copies its inputs, which brings the blocks of a sliced cache together
    layout = LAYOUTS[0]
    arguments["kv_cache"] = allocate_kv_cache(len(arguments["kv_cache"]), 4, layout, "cpu")
    arguments["index_cache"].zero_()
    scan = scan_of(arguments)
    sizes = (layout.name, layout.d_nope, layout.d_rope, 4)
    tensors = [scan["scan_q"], *(scan[name] for name in SCAN[1:7])]
    core = torch.zeros(2, 1, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.model1.lowrank_topk,
        (*tensors, scan["core_count"], 12, 3, 9, *sizes, True, "ref"),
    )
    torch.library.opcheck(
        torch.ops.model1.lowrank_remainder, (*tensors, core, 9, True, *sizes, True, "ref")
    )
    compiled = torch.compile(
        lambda: lowrank_attention(**arguments, backend=TESTED), fullgraph=True, backend="aot_eager"
    )
    want = lowrank_attention(**arguments, backend=TESTED)
    assert all(torch.equal(a, b) for a, b in zip(compiled(), want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 3, 95)}, r"q must be \[t, h, 96\], got \[3, 3, 95\]"),
        ({"q": torch.zeros(3, 3, 96).double()}, "q must be bfloat16, float16 or float32"),
        ({"index_cache": torch.zeros(7, 16)}, r"index_cache must have 124 slots, got 7"),
        ({"index_cache": torch.zeros(124, 16).half()}, "index_cache must be bfloat16 or float32"),
        ({"key_end": torch.zeros(3)}, r"key_end must be contiguous \[3\] int32"),
        ({"core_count": torch.zeros(2).int()}, r"core_count must be contiguous \[3\] int32"),
        ({"cu_seqlens_q": torch.zeros(3).int()}, r"cu_seqlens_q must be contiguous \[4\] int32"),
        ({"max_seqlen": 41}, r"max_seqlen must be in 0..40, .* got 41"),
        ({"max_seqlen_q": 0}, "max_seqlen_q must be at least 1, got 0"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 2, 4]).int()}, r"from 0 to at most 3, got \[0, 1, 2"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 1, 3]).int()}, "cu_seqlens_q must not fall"),
        ({"cu_seqlens_q": torch.tensor([0, 0, 0, 3]).int(), "max_seqlen_q": 2}, "has 3 tokens"),
        ({"key_end": torch.tensor([1, 41, 2]).int()}, r"key_end must be at most .* = \d+, got 41"),
        ({"topk": 0}, "topk must be at least 1, got 0"),
        ({"sliding_window": 13}, r"sliding_window must be in 0..topk = 12, got 13"),
        ({"basis": torch.zeros(16, 63)}, r"basis must be \[16, 64\] floating point"),
        ({"mean": torch.zeros(64).int()}, r"mean must be \[64\] floating point"),
        ({"value_dim": 64}, "value_dim must be 96, got 64"),
        ({"attn_sink": torch.zeros(2)}, r"attn_sink must be \[3\] float32"),
        ({"block_table": torch.zeros(3, 10)}, r"block_table must be \[b, max_blocks\] int32"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowrank_attention(**(arguments_of() | change), backend=TESTED)


def test_wrong_cores_are_named() -> None:
    scan = scan_of(arguments_of())
    with pytest.raises(ValueError, match=r"core_indices must be \[3, k\], got \[2, 4\]"):
        lowrank_remainder(**rest_of(scan, torch.zeros(2, 4).int(), True), backend=TESTED)
    with pytest.raises(ValueError, match="core_indices must be int32"):
        lowrank_remainder(**rest_of(scan, torch.zeros(3, 4), True), backend=TESTED)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="got 'refs'"):
        lowrank_attention(**arguments_of(), backend="refs")
