"""RMS normalisation and SwiGLU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near

from model1.ops.activation import swiglu
from model1.ops.norm import rms_norm


@given(
    t=st.integers(0, 4),
    d=st.integers(1, 20),
    exponent=st.integers(-5, 5),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_rms_norm_equals_a_float64_loop(
    t: int, d: int, exponent: int, weighted: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(t, d) * 10.0**exponent, torch.randn(d) if weighted else None
    got = rms_norm(x, weight, 1e-6)
    for i in range(t):
        row = x[i].tolist()
        rms = math.sqrt(sum(v * v for v in row) / d + 1e-6)
        for j in range(d):
            factor = 1.0 if weight is None else weight[j].item()
            assert got[i, j].item() == pytest.approx(row[j] / rms * factor, rel=1e-5, abs=1e-6)


def test_rms_norm_of_zero_is_zero() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    out = rms_norm(x, torch.ones(4), 1e-6)
    assert torch.equal(out, torch.zeros(2, 4))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_rms_norm_keeps_the_dtype_and_takes_its_mean_in_fp32() -> None:
    x = torch.randn(3, 4096).bfloat16()
    weight = 1 + torch.randn(4096) * 0.1  # fp32 master weight under bf16 activations
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    want = rms_norm(x.double(), weight.double(), 1e-6)
    # Weight and result are rounded once each. A sum in bf16 would be off by far more.
    assert ((got.double() - want).abs() <= want.abs() * 2**-7 + 1e-6).all()


@torch.no_grad()
def test_a_callers_default_type_and_device_leave_no_trace() -> None:
    x, eps = torch.randn(2, 9), 0.0375  # of no other test: constants are kept by eps and width
    want = (x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()).float()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            rms_norm(x, None, eps)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(rms_norm(x, None, eps), want)


def test_rms_norm_gradient_against_finite_differences() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 1e-3), (x,))


@given(gate=st.floats(-30, 30), up=st.floats(-30, 30), limit=st.sampled_from([None, 1.5, 10.0]))
@settings(max_examples=100, deadline=None)
def test_swiglu_equals_the_formula(gate: float, up: float, limit: float | None) -> None:
    got = swiglu(torch.tensor([gate]).double(), torch.tensor([up]).double(), limit)
    gate, up = torch.tensor([gate, up]).tolist()  # as fp32 stores them
    if limit is not None:
        gate, up = min(gate, limit), min(max(up, -limit), limit)
    assert got.item() == pytest.approx(gate / (1 + math.exp(-gate)) * up, rel=1e-9, abs=1e-12)


def test_the_limit_bounds_the_gate_from_above_only_and_stops_its_gradient() -> None:
    gate = torch.tensor([12.0, -12.0, 3.0], requires_grad=True)
    up = torch.tensor([1.0, -12.0, 12.0], requires_grad=True)
    out = swiglu(gate, up, 10.0)
    silu = torch.nn.functional.silu
    assert_near(out[1], silu(torch.tensor(-12.0)) * -10, 1e-6)
    out.sum().backward()
    assert gate.grad is not None
    assert up.grad is not None
    assert gate.grad[0] == 0
    assert gate.grad[1] != 0
    assert torch.equal(up.grad[1:], torch.zeros(2))
    assert up.grad[0] == silu(torch.tensor(10.0))
