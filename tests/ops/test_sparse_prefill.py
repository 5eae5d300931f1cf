"""Sparse prefill in plain PyTorch against a loop in fp64, its gradient, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend_option import TESTED
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, naive_attention
from sparse_prefill_cases import (
    INVALID,
    Shape,
    check_batch_invariance,
    check_empty_lists,
    make_arguments,
    valid_entries,
)
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.backend import Operator
from model1.ops.sparse_prefill import SPARSE_PREFILL, sparse_prefill
from model1.ops.sparse_prefill.gradient import SPARSE_PREFILL_BACKWARD

# Only the reference computes in fp64.
DTYPE, TOLERANCE = (torch.float64, 1e-12) if TESTED == "ref" else (torch.float32, 1e-5)


def reference(arguments: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return sparse_prefill(**{"backend": TESTED} | arguments | options)


def cpu_arguments(dtype: torch.dtype = torch.float32, **shape: Any) -> dict[str, Any]:
    arguments = make_arguments(Shape(**shape), dtype=dtype)
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}


@given(
    t=st.integers(0, 4),
    h=st.integers(1, 3),
    s=st.integers(1, 9),
    topk=st.integers(0, 6),
    has_length=st.booleans(),
    has_sink=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_float64_loop(
    t: int, h: int, s: int, topk: int, has_length: bool, has_sink: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    q, kv = torch.randn(t, h, 16, dtype=DTYPE), torch.randn(s, 16, dtype=DTYPE)
    # distinct keys: the loop marks visible rows and cannot count one twice
    index = torch.rand(t, 2 * s + topk).argsort(-1)[:, :topk].int() - s
    length = torch.randint(topk + 1, (t,), dtype=torch.int32) if has_length else None
    sink = torch.randn(h) if has_sink else None
    got = sparse_prefill(
        q, kv, index, value_dim=11, softmax_scale=0.3, topk_length=length, attn_sink=sink,
        backend=TESTED,
    )  # fmt: skip
    q, kv = q.double(), kv.double()
    visible = torch.zeros(t, s, dtype=torch.bool)
    for i, j in valid_entries(index, length, s).nonzero().tolist():
        visible[i, index[i, j]] = True
    out, lse = naive_attention(q, kv, visible, value_dim=11, scale=0.3, sink=sink)
    logits = torch.einsum("thd,sd->ths", q, kv) * 0.3
    largest = logits.masked_fill(~visible[:, None], -math.inf).amax(-1)
    assert_near(got.out, out, max(TOLERANCE, 1e-7 if has_sink else 0.0))  # the sink is fp32
    assert_near(got.lse, lse, TOLERANCE)
    assert_near(got.max_logits, largest, TOLERANCE)


def test_an_index_that_occurs_twice_counts_twice() -> None:
    q, kv = torch.randn(1, 2, 16, dtype=DTYPE), torch.randn(3, 16, dtype=DTYPE)
    index = torch.tensor([[0, 2, 2]], dtype=torch.int32)
    got = sparse_prefill(q, kv, index, value_dim=16, softmax_scale=1.0, backend=TESTED)
    q, kv = q.double(), kv.double()
    rows = torch.cat([kv, kv[2:]])
    visible = torch.tensor([[True, False, True, True]])
    out, lse = naive_attention(q, rows, visible, value_dim=16, scale=1.0, sink=None)
    assert_near(got.out, out, TOLERANCE)
    assert_near(got.lse, lse, TOLERANCE)


@pytest.mark.parametrize("has_sink", [False, True])
def test_gradient_against_finite_differences(has_sink: bool) -> None:
    q = torch.randn(4, 2, 16, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 5, 5], [-1, 6, 2], [INVALID[0], -1, 9], [1, 2, 3]]).int()
    length = torch.tensor([3, 3, 3, 2], dtype=torch.int32)
    sink = torch.tensor([0.3, -math.inf]) if has_sink else None

    def call(q: Tensor, kv: Tensor) -> Tensor:
        return sparse_prefill(
            q, kv, index, value_dim=9, softmax_scale=0.7, topk_length=length, attn_sink=sink,
            backend="ref",
        ).out  # fmt: skip

    assert torch.autograd.gradcheck(call, (q, kv))


def test_gradient_of_the_sink_against_finite_differences() -> None:
    arguments = cpu_arguments(torch.float64, h=3)
    sink = torch.tensor([0.3, -2.0, 1.5])
    dout = torch.randn(4, 3, 32, dtype=torch.float64)

    def loss(sink: Tensor) -> Tensor:
        return (reference(arguments, attn_sink=sink, backend="ref")[0] * dout).sum()

    (got,) = torch.autograd.grad(loss(leaf := sink.clone().requires_grad_()), leaf)
    step = 2.0**-7  # exact in fp32
    for head in range(3):
        up, down = sink.clone(), sink.clone()
        up[head] += step
        down[head] -= step
        assert abs((loss(up) - loss(down)) / (2 * step) - got[head]) < 1e-4


def test_infinite_sinks_switch_heads_off_or_do_nothing() -> None:
    arguments = cpu_arguments(h=2) | {"attn_sink": torch.tensor([math.inf, -math.inf])}
    with_sink, without = reference(arguments), reference(arguments, attn_sink=None)
    assert not with_sink[0][:, 0].any()
    assert torch.equal(with_sink[0][:, 1], without[0][:, 1])
    assert torch.equal(with_sink[2], without[2])
    sink = torch.tensor([math.inf, -math.inf], requires_grad=True)
    reference(arguments, attn_sink=sink)[0].sum().backward()
    assert sink.grad is not None
    assert torch.equal(sink.grad, torch.zeros(2))


def test_only_out_carries_a_gradient() -> None:
    arguments = cpu_arguments()
    q = arguments["q"].clone().requires_grad_()
    out, max_logits, lse = reference(arguments, q=q)
    assert out.requires_grad
    assert not max_logits.requires_grad
    assert not lse.requires_grad


def test_chunks_of_queries_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = cpu_arguments(t=7)
    want = reference(arguments, backend="ref")
    monkeypatch.setattr("model1.ops.sparse_prefill.ref.GATHERED_BYTES", 1)
    for got, expected in zip(reference(arguments, backend="ref"), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("empty_lse", [-math.inf, math.inf, 7.0])
def test_queries_without_keys(empty_lse: float) -> None:
    index = torch.tensor([INVALID, INVALID], dtype=torch.int32)
    q, kv = torch.randn(2, 3, 16), torch.full((5, 16), math.nan)
    for keys in (kv, kv[:0]):
        out, max_logits, lse = sparse_prefill(
            q, keys, index, value_dim=16, softmax_scale=1.0, empty_lse=empty_lse, backend=TESTED
        )
        assert torch.equal(out, torch.zeros(2, 3, 16))
        assert (max_logits == -math.inf).all()
        assert (lse == empty_lse).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_empty_lists_are_lists_without_a_key(deterministic: bool) -> None:
    options = {"deterministic": deterministic, "backend": TESTED}
    for arguments in (cpu_arguments(topk=0), cpu_arguments(topk=0, s=0, has_length=False)):
        check_empty_lists(arguments, options)


@pytest.mark.parametrize("has_length", [False, True])
def test_deterministic_rows_know_neither_mates_nor_padding(has_length: bool) -> None:
    check_batch_invariance(cpu_arguments(has_length=has_length, t=5), backend=TESTED)


@pytest.mark.built_in
def test_auto_is_resolved_before_the_operators_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, load = [], Operator.load

    def recorded(operator: Operator, name: str) -> Any:
        seen.append((operator.name, name))
        return load(operator, name)

    monkeypatch.setattr(Operator, "load", recorded)
    arguments = cpu_arguments()
    q = arguments["q"].requires_grad_()
    sparse_prefill(**arguments | {"q": q}).out.sum().backward()
    assert seen == [("sparse_prefill", "ref"), ("sparse_prefill_backward", "ref")]


def test_opcheck() -> None:
    q = torch.randn(3, 2, 16, requires_grad=True)
    kv = torch.randn(5, 16, requires_grad=True)
    index = torch.randint(-1, 5, (3, 4), dtype=torch.int32)
    length = torch.tensor([0, 2, 4], dtype=torch.int32)
    sink = torch.randn(2, requires_grad=True)
    for vectors in ((length, sink), (None, None)):
        arguments = (q, kv, index, *vectors, 9, 0.5, math.inf, False, "ref", "ref")
        torch.library.opcheck(torch.ops.model1.sparse_prefill, arguments)
        out, _, lse = torch.ops.model1.sparse_prefill(*arguments)
        saved = [x if x is None else x.detach() for x in (q, kv, index, *vectors, out, lse)]
        torch.library.opcheck(
            torch.ops.model1.sparse_prefill_backward,
            (torch.randn(3, 2, 9), *saved, 0.5, True, "ref"),
        )


@pytest.mark.parametrize("has_sink", [False, True])
def test_compiles_as_one_graph_with_its_gradient(has_sink: bool) -> None:
    arguments = cpu_arguments(has_sink=has_sink)
    names = ["q", "kv"] + ["attn_sink"] * has_sink

    def loss(**leaves: Tensor) -> Tensor:
        out, max_logits, _ = reference(arguments, **leaves)
        return out.square().sum() + max_logits.clamp(-1, 1).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = {name: arguments[name].nan_to_num().requires_grad_() for name in names}
        value = function(**leaves)
        results.append([value, *torch.autograd.grad(value, list(leaves.values()))])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.built_in
@pytest.mark.triton
def test_a_function_of_its_own_for_every_backend() -> None:
    for operator in (SPARSE_PREFILL, SPARSE_PREFILL_BACKWARD):
        assert operator.resolve("auto", torch.device("cpu")) == "ref"
        for backend in ("ref", "triton"):
            assert callable(operator.load(backend))
    with pytest.raises(BackendUnavailable, match="backend must be one of"):
        sparse_prefill(**cpu_arguments(), backend="cuda")


GOOD = {
    "q": torch.zeros(2, 3, 16),
    "kv": torch.zeros(5, 16),
    "topk_indices": torch.zeros(2, 4, dtype=torch.int32),
    "value_dim": 16,
    "softmax_scale": 1.0,
}
SHORT = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(2, 16)}, r"q must be \[t, h, d\], got \[2, 16\]"),
        ({"q": torch.zeros(2, 0, 16)}, r"q must be \[t, h, d\], got \[2, 0, 16\]"),
        ({"q": torch.zeros(2, 3, 20)}, "q must have a multiple of 16 channels, got 20"),
        ({"kv": torch.zeros(5, 1, 16)}, r"kv must be \[s, 16\], got \[5, 1, 16\]"),
        ({"kv": torch.zeros(5, 32)}, r"kv must be \[s, 16\], got \[5, 32\]"),
        ({"kv": torch.zeros(5, 16).half()}, "got torch.float32 and torch.float16"),
        ({"q": torch.zeros(2, 3, 16).int()}, "got torch.int32 and torch.float32"),
        ({"value_dim": 17}, r"value_dim must be in 1\.\.16, got 17"),
        ({"value_dim": 0}, r"value_dim must be in 1\.\.16, got 0"),
        ({"q": torch.zeros(2, 16, 32)[..., ::2]}, "q must be contiguous along its last axis"),
        ({"kv": torch.zeros(16, 5).T}, "kv must be contiguous along its last axis"),
        ({"topk_indices": torch.zeros(3, 4).int()}, r"\[2, topk\], got \[3, 4\]"),
        ({"topk_indices": torch.zeros(2, 4).long()}, "topk_indices must be int32"),
        ({"topk_indices": torch.zeros(4, 2).int().T}, "topk_indices must be contiguous"),
        ({"topk_length": SHORT[:1]}, r"topk_length must be contiguous \[2\] torch.int32"),
        ({"topk_length": SHORT.long()}, r"topk_length .* got \[2\] torch.int64"),
        ({"attn_sink": torch.zeros(4)}, r"attn_sink must be contiguous \[3\] torch.float32"),
        ({"attn_sink": torch.zeros(3).half()}, r"attn_sink .* got \[3\] torch.float16"),
        ({"attn_sink": torch.zeros(6)[::2]}, r"attn_sink .* strides \(2,\)"),
        ({"attn_sink": torch.zeros(3, device="meta")}, "attn_sink must be on q's device cpu"),
        ({"kv": torch.zeros(5, 16, device="meta")}, "kv must be on q's device cpu, got meta"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_prefill(**GOOD | wrong)
