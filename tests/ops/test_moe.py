"""Routing and routed experts against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, double_precision
from torch import Tensor

from model1.ops.moe import moe_experts, moe_route


def affinity(logit: float) -> float:
    return math.sqrt(math.log1p(math.exp(-abs(logit))) + max(logit, 0.0))


@given(
    t=st.integers(0, 4), e=st.integers(1, 6), scaling=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_route_equals_a_float64_loop(t: int, e: int, scaling: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits, bias = torch.randn(t, e) * 4, torch.randn(e)
    topk = int(torch.randint(1, e + 1, ()))
    weights, ids = moe_route(logits, bias, topk=topk, scaling=scaling)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int64
    for i in range(t):
        g = [affinity(x) for x in logits[i].tolist()]
        order = sorted(range(e), key=lambda j: -(g[j] + bias[j].item()))
        assert set(ids[i].tolist()) == set(order[:topk])
        total = sum(g[j] for j in order[:topk])
        for weight, j in zip(weights[i].tolist(), ids[i].tolist(), strict=True):
            assert weight == pytest.approx(scaling * g[j] / total, abs=1e-5)


def test_the_balance_bias_moves_the_choice_and_never_the_weights() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    plain, plain_ids = moe_route(logits, torch.zeros(3), topk=2, scaling=1.0)
    assert plain_ids.tolist() == [[0, 1]]
    weights, ids = moe_route(logits, torch.tensor([0.0, -9.0, 0.0]), topk=2, scaling=1.0)
    assert ids.tolist() == [[0, 2]]
    # Lifting every expert equally changes nothing at all.
    lifted, lifted_ids = moe_route(logits, torch.full((3,), 0.5), topk=2, scaling=1.0)
    assert torch.equal(lifted, plain)
    assert torch.equal(lifted_ids, plain_ids)
    g = [affinity(3.0), affinity(1.0)]
    assert_near(weights, torch.tensor([[g[0], g[1]]]) / sum(g), 1e-6)


def test_route_gradient_against_finite_differences() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 1.1], [1.5, -0.4, -2.0, 0.2]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.2, -0.1, 0.0], dtype=torch.float64)

    def op(logits: Tensor) -> Tensor:
        return moe_route(logits, bias, topk=2, scaling=1.5)[0]

    with double_precision():
        assert torch.autograd.gradcheck(op, (logits.requires_grad_(),))


def test_logits_that_vanish_in_fp32_keep_weights_and_gradients_finite() -> None:
    logits = torch.tensor([[-200.0, 1.0, -300.0], [-200.0, -200.0, -200.0]], requires_grad=True)
    weights, _ = moe_route(logits, torch.zeros(3), topk=3, scaling=1.0)
    assert weights.isfinite().all()
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def expert_inputs(
    t: int, c: int, m: int, e: int, topk: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids = torch.stack([torch.randperm(e)[:topk] for _ in range(t)]) if t else torch.zeros(0, topk)
    parts = torch.randn(t, c), torch.rand(t, topk), torch.randn(e, 2 * m, c), torch.randn(e, c, m)
    x, weights, gate_up, down = (part.to(dtype) for part in parts)
    return x, weights, ids.long(), gate_up, down


def naive_experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, limit: float | None
) -> Tensor:
    x, weights, gate_up, down = (v.double() for v in (x, weights, gate_up, down))
    out = torch.zeros_like(x)
    for i in range(len(x)):
        for weight, expert in zip(weights[i], ids[i].tolist(), strict=True):
            m = down.shape[2]
            hidden = torch.zeros(m, dtype=torch.float64)
            for unit in range(m):
                gate = (gate_up[expert, unit] @ x[i]).item()
                up = (gate_up[expert, m + unit] @ x[i]).item()
                if limit is not None:
                    gate, up = min(gate, limit), max(-limit, min(up, limit))
                hidden[unit] = gate / (1 + math.exp(-gate)) * up
            out[i] += weight * (down[expert] @ hidden)
    return out


@given(
    t=st.integers(0, 4),
    e=st.integers(1, 4),
    limit=st.sampled_from([None, 1.0, 10.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_experts_equal_a_float64_loop(t: int, e: int, limit: float | None, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = expert_inputs(t, 5, 3, e, int(torch.randint(1, e + 1, ())))
    got = moe_experts(*inputs, swiglu_limit=limit)
    assert_near(got, naive_experts(*inputs, limit), 1e-4)


def test_expert_gradients_against_finite_differences() -> None:
    x, weights, ids, gate_up, down = expert_inputs(4, 3, 2, 3, 2, torch.float64)
    leaves = [v.requires_grad_() for v in (x, weights, gate_up, down)]

    def op(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe_experts(x, weights, ids, gate_up, down, swiglu_limit=None)

    assert torch.autograd.gradcheck(op, leaves)


def test_an_expert_that_nobody_chose_is_not_read() -> None:
    x, weights, ids, gate_up, down = expert_inputs(6, 4, 3, 4, 2)
    ids = ids.clamp(max=1)
    gate_up[2:], down[2:] = math.nan, math.nan
    assert moe_experts(x, weights, ids, gate_up, down, swiglu_limit=10.0).isfinite().all()


def test_order_of_tokens_and_of_choices_does_not_matter() -> None:
    x, weights, ids, gate_up, down = expert_inputs(9, 8, 4, 4, 3)
    want = moe_experts(x, weights, ids, gate_up, down, swiglu_limit=10.0)
    order = torch.randperm(9)
    got = moe_experts(x[order], weights[order], ids[order], gate_up, down, swiglu_limit=10.0)
    assert torch.equal(got, want[order])
    swapped = moe_experts(x, weights.flip(1), ids.flip(1), gate_up, down, swiglu_limit=10.0)
    assert torch.equal(swapped, want)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"topk must be in 1\.\.3, got 4"):
        moe_route(torch.zeros(2, 3), torch.zeros(3), topk=4, scaling=1.0)
    with pytest.raises(ValueError, match=r"balance_bias must be \[3\], got \[2\]"):
        moe_route(torch.zeros(2, 3), torch.zeros(2), topk=1, scaling=1.0)
    x, weights, ids, gate_up, down = expert_inputs(2, 4, 3, 4, 2)
    with pytest.raises(ValueError, match=r"must be \[2, topk\], got \[2, 2\], \[2, 1\]"):
        moe_experts(x, weights, ids[:, :1], gate_up, down, swiglu_limit=None)
