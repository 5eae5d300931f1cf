"""MHA prefill, its contract and oracle: loops in fp64, gradients, ragged batches, errors."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mha_prefill_cases import NAMES, Case, Shape, check, check_batch_invariance, random_case
from oracles import assert_near, double_precision, naive_attention
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.mha_prefill import mha_prefill
from model1.ops.mha_prefill.ref import mha_prefill_backward_ref, mha_prefill_ref


def results(case: Case, **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of the operator."""
    arguments = case.arguments()
    out, lse = mha_prefill(**arguments, **options)
    gradients = torch.autograd.grad(out, [arguments[name] for name in "qkv"], case.d_out)
    return dict(zip(NAMES, (out.detach(), lse, *gradients), strict=True))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=3),
    hkv=st.integers(1, 2),
    group=st.integers(1, 2),
    d=st.integers(1, 5),
    dv=st.integers(1, 5),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_equals_a_float64_loop(
    lengths: list[tuple[int, int]], hkv: int, group: int, d: int, dv: int, causal: bool, seed: int
) -> None:
    q_lengths, k_lengths = [n for n, _ in lengths], [s for _, s in lengths]
    shape = Shape(h=hkv * group, hkv=hkv, d=d, dv=dv, causal=causal)
    case = random_case(shape, q_lengths, k_lengths, seed)
    out, lse = mha_prefill(**case.arguments())
    parts = zip(
        *(x.split(q_lengths) for x in (case.q, out.detach(), lse)),
        *(x.split(k_lengths) for x in (case.k, case.v)),
        strict=True,
    )
    for q, got_out, got_lse, k, v in parts:
        n, s = len(q), len(k)
        ends = torch.tensor([s - (n - 1 - j) if causal else s for j in range(n)])
        visible = torch.arange(s) < ends[:, None]
        for head in range(shape.h):
            kv = torch.cat([v[:, head // group], k[:, head // group]], dim=1)
            padded = torch.cat([torch.zeros(n, dv), q[:, head]], dim=1)[:, None]
            want = naive_attention(padded, kv, visible, value_dim=dv, scale=d**-0.5, sink=None)
            assert_near(got_out[:, head], want[0][:, 0], 2e-5)
            assert_near(got_lse[:, head], want[1][:, 0], 2e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_against_finite_differences(causal: bool) -> None:
    shape = Shape(h=2, hkv=1, d=3, dv=2, dtype=torch.float64, causal=causal)
    case = random_case(shape, [3, 2, 0], [2, 4, 1], 0)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    arguments = case.arguments()
    rest = [arguments[f"{name}_{x}"] for name in ("cu_seqlens", "max_seqlen") for x in "qk"]
    options = {"softmax_scale": 0.7, "causal": causal}

    class Ref(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *qkv: Tensor) -> Tensor:
            out, _ = mha_prefill_ref(*qkv, *rest, **options)
            ctx.save_for_backward(*qkv, out)
            # the library keeps lse in fp32, which finite differences would notice
            ctx.lse = _exact_lse(case, *qkv[:2])
            return out

        @staticmethod
        def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            *qkv, out = ctx.saved_tensors
            fixed = (*rest[:2], out, ctx.lse, *rest[2:])
            return mha_prefill_backward_ref(d_out, *qkv, *fixed, **options)

    with double_precision():
        assert torch.autograd.gradcheck(Ref.apply, leaves)


def _exact_lse(case: Case, q: Tensor, k: Tensor) -> Tensor:
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    q_end = k_end = 0
    for n, s in zip(case.q_lengths, case.k_lengths, strict=True):
        q_i, k_i = q[q_end : q_end + n], k[k_end : k_end + s]
        scores = torch.einsum("nhd,sxd->nhs", q_i, k_i) * 0.7
        if case.causal:
            hidden = torch.arange(s) > torch.arange(s - n, s)[:, None]
            scores = scores.masked_fill(hidden[:, None], -math.inf)
        lse[q_end : q_end + n] = scores.logsumexp(-1)
        q_end, k_end = q_end + n, k_end + s
    return lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_results_and_gradients_follow_the_formula(dtype: torch.dtype, causal: bool) -> None:
    shape = Shape(h=4, hkv=2, d=24, dv=16, dtype=dtype, causal=causal)
    case = random_case(shape, [5, 0, 9, 1], [9, 4, 5, 0], 0)
    got = results(case)
    check(case, got, str(dtype))
    assert got["out"].dtype == got["dq"].dtype == dtype
    assert got["lse"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_requests_know_neither_order_nor_number_of_their_mates(dtype: torch.dtype) -> None:
    shape = Shape(h=3, hkv=1, d=7, dv=5, dtype=dtype, causal=True)
    case = random_case(shape, [5, 0, 9, 1], [9, 4, 5, 2], 0)
    for deterministic in (False, True):
        check_batch_invariance(case, functools.partial(results, deterministic=deterministic))


def test_empty_batches() -> None:
    shape = Shape(h=2, hkv=1, d=8, dv=4)
    for q_lengths, k_lengths in (([], []), ([0], [0]), ([0, 0], [3, 0]), ([2], [0])):
        case = random_case(shape, q_lengths, k_lengths, 0)
        got = results(case)
        assert got["out"].shape == (sum(q_lengths), 2, 4)
        assert not got["out"].any()
        assert torch.equal(got["lse"], torch.full((sum(q_lengths), 2), -math.inf))
        assert not any(got[name].any() for name in ("dq", "dk", "dv"))


def test_requests_do_not_see_each_other() -> None:
    case = random_case(Shape(h=2, hkv=2, d=8, dv=8, causal=True), [4, 3], [4, 5], 0)
    want = results(case)
    case.k[:4], case.v[:4] = math.nan, math.nan
    got = results(case)
    for name, rows in (("out", 4), ("lse", 4), ("dq", 4), ("dk", 4), ("dv", 4)):
        assert torch.equal(got[name][rows:], want[name][rows:])


def test_no_gradient_flows_through_lse() -> None:
    case = random_case(Shape(h=2, hkv=2, d=8, dv=8), [4], [4], 0)
    out, lse = mha_prefill(**case.arguments())
    assert out.requires_grad
    assert not lse.requires_grad


def test_the_ops_describe_themselves_to_pytorch() -> None:
    case = random_case(Shape(h=4, hkv=2, d=8, dv=6, causal=True), [4, 1], [3, 2], 0)
    a = case.arguments()
    lengths = (a["cu_seqlens_q"], a["cu_seqlens_k"], 4, 3)
    tensors = (a["q"], a["k"], a["v"])
    ops = torch.ops.model1
    torch.library.opcheck(ops.mha_prefill.default, (*tensors, *lengths, 0.3, True, "ref"))
    tensors = tuple(x.detach() for x in tensors)
    out, lse = ops.mha_prefill(*tensors, *lengths, 0.3, True, "ref")
    torch.library.opcheck(
        ops.mha_prefill_backward.default,
        (case.d_out, *tensors, *lengths[:2], out, lse, *lengths[2:], 0.3, True, "ref"),
    )


def test_one_graph_under_torch_compile() -> None:
    case = random_case(Shape(h=2, hkv=1, d=8, dv=8, causal=True), [4, 3], [4, 5], 0)
    arguments = case.arguments()
    q = arguments.pop("q")

    def step(q: Tensor) -> Tensor:
        out, lse = mha_prefill(2 * q, **arguments)
        return out.sum() + lse.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), step(q))
    assert torch.equal(*(torch.autograd.grad(f(q), q)[0] for f in (compiled, step)))


def _good() -> dict[str, Any]:
    sums = torch.tensor([0, 1, 3], dtype=torch.int32)
    return {
        "q": torch.zeros(3, 4, 8), "k": torch.zeros(3, 2, 8), "v": torch.zeros(3, 2, 6),
        "cu_seqlens_q": sums, "cu_seqlens_k": sums, "max_seqlen_q": 2, "max_seqlen_k": 2,
        "softmax_scale": 1.0, "causal": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 8)}, r"q must be \[t, h, d\], got \[3, 8\]"),
        ({"q": torch.zeros(3, 4, 8).double()}, "q must be bfloat16, .* got torch.float64"),
        ({"q": torch.zeros(3, 3, 8)}, "h must be a multiple of hkv, got 3 and 2"),
        ({"q": torch.zeros(3, 8, 4).mT}, "q must be contiguous along its last axis"),
        ({"k": torch.zeros(3, 2, 6)}, r"k must be \[s, hkv, 8\], got \[3, 2, 6\]"),
        ({"v": torch.zeros(2, 2, 6)}, r"v must be \[3, 2, dv\], got \[2, 2, 6\]"),
        ({"v": torch.zeros(3, 2, 6).half()}, "v must be torch.float32 on cpu like q, got"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 3])}, r"cu_seqlens_q must .* got \[3\] torch.int64"),
        (
            {"cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32), "max_seqlen_q": 3},
            "must be of one length, got",
        ),
        ({"cu_seqlens_k": torch.tensor([0, 1, 2], dtype=torch.int32)}, "go from 0 to 3, got"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 3], dtype=torch.int32)}, "must not fall"),
        ({"max_seqlen_q": 1}, "max_seqlen_q is 1, but a request has 2 tokens"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    mha_prefill(**_good())
    with pytest.raises(ValueError, match=message):
        mha_prefill(**{**_good(), **change})


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="backend must be one of"):
        mha_prefill(**_good(), backend="library")
