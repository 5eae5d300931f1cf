"""Inverse rotation and gate: the formula in fp64, kernels, gradients."""

from __future__ import annotations

import math
import mmap
from typing import Any

import pytest
import torch
from backend_option import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.rope import Rotation, apply_rope, rope_frequencies, rotation
from model1.ops.rope_gate import INVERSE_ROPE_GATE, inverse_rope_gate
from model1.testing.compare import assert_close_rows

# Without a GPU the kernels run in Triton's interpreter, which a GPU build does not offer.
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same kernels")
DEVICES = [
    pytest.param("cpu", marks=INTERPRETED, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
SHAPES = [  # t, h, dv, d_rope
    (3, 2, 16, 4),
    (1, 1, 2, 2),
    (2, 5, 24, 24),
    (5, 3, 7, 0),
    (2, 9, 512, 64),
    (1, 3, 100, 32),
]


def _angles(t: int, d_rope: int, device: str = "cpu") -> Rotation:
    frequencies = rope_frequencies(d_rope, 10000.0).to(device)
    return rotation(torch.randint(0, 100000, (t,), device=device), frequencies)


def _formula(out: Tensor, angles: Rotation | None, gate: Tensor | None) -> Tensor:
    """In fp64, a pair as one complex number."""
    out = out.double().clone()
    if angles is not None and angles.cos.shape[1]:
        cos, sin = (a.double()[:, None, 1::2] for a in angles)
        d_rope = angles.cos.shape[1]
        pair = torch.view_as_complex(out[..., -d_rope:].clone().unflatten(-1, (-1, 2)))
        turned = pair * torch.complex(cos, -sin)
        out[..., -d_rope:] = torch.view_as_real(turned).flatten(2)
    return out if gate is None else out * gate.double()[..., None]


@given(
    t=st.integers(0, 4),
    h=st.integers(0, 3),
    plain=st.integers(0, 5),
    pairs=st.integers(1, 4),
    turns=st.booleans(),
    gated=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_equals_the_formula_in_float64(
    t: int, h: int, plain: int, pairs: int, turns: bool, gated: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    out = torch.randn(t, h, plain + 2 * pairs)
    angles = _angles(t, 2 * pairs) if turns else None
    gate = torch.randn(t, h) if gated else None
    got = inverse_rope_gate(out, angles, gate, d_rope=2 * pairs)
    torch.testing.assert_close(got.double(), _formula(out, angles, gate), rtol=1e-5, atol=1e-6)


def test_undoes_a_rotation() -> None:
    values, angles = torch.randn(5, 3, 24), _angles(5, 8)
    turned = torch.cat([values[..., :16], apply_rope(values[..., 16:], angles)], dim=-1)
    back = inverse_rope_gate(turned, angles, torch.ones(5, 3), d_rope=8)
    torch.testing.assert_close(back, values, rtol=1e-5, atol=1e-5)


def _separate_steps(out: Tensor, angles: Rotation | None, gate: Tensor | None) -> Tensor:
    """What plain PyTorch does in the dtype of out."""
    if angles is not None:
        d_rope = angles.cos.shape[1]
        plain, rope = out.split([out.shape[-1] - d_rope, d_rope], dim=-1)
        out = torch.cat([plain, apply_rope(rope, angles, inverse=True)], dim=-1)
    return out if gate is None else out * gate.to(out.dtype)[..., None]


def _check_kernel(number: int, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Result and gradients of one random call, by the rule of `model1.testing.compare`."""
    torch.manual_seed(number)
    t, h, dv, d_rope = shape
    variant = number // 12 % 3
    wide = torch.randn(t, h + 1, dv + 3, dtype=dtype, device=device)
    angles = _angles(t, d_rope, device) if d_rope and variant != 1 else None
    gate = torch.randn(h, t, device=device).to(dtype if variant else torch.float32).T
    gate = None if variant == 2 and angles is not None else gate
    grad = torch.randn(t, h, dv, dtype=dtype, device=device)

    results = []
    for run, convert in (
        (lambda *a: inverse_rope_gate(*a, d_rope=d_rope, backend="triton"), dtype),
        (_separate_steps, dtype),
        (_formula, torch.float64),
    ):
        leaf = wide.detach().to(convert).requires_grad_()
        scale = None if gate is None else gate.detach().requires_grad_()
        result = run(leaf[:, :h, :dv], angles, scale)
        result.backward(grad.to(result.dtype))
        assert leaf.grad is not None
        results.append([result, leaf.grad])
        if scale is not None and scale.grad is not None:
            results[-1].append(scale.grad.reshape(1, -1))  # one number is no row to judge by
    for got, baseline, expected in zip(*results, strict=True):
        if got.dtype == torch.float32:
            baseline = expected
        try:
            assert_close_rows(got.detach(), baseline.detach(), expected.detach())
        except AssertionError as error:
            raise AssertionError(f"case {number}, {shape}, {dtype}") from error


@INTERPRETED
@pytest.mark.triton
@pytest.mark.parametrize("number", range(0, 36, 2))
def test_kernel_equals_the_formula(number: int) -> None:
    dtype = torch.bfloat16 if number % 8 == 0 else torch.float32
    _check_kernel(number, "cpu", SHAPES[number // 2 % len(SHAPES)], dtype)


@pytest.mark.gpu
def test_kernel_equals_the_formula_on_a_gpu() -> None:
    for number in range(500):  # what the kernels are compiled for repeats every 36 numbers
        dv, d_rope = ((512, 64), (128, 0), (512, 32), (96, 96))[number % 4]
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        h, t = (64, 128, 5)[number // 12 % 3], 1 + number * 37 % 200
        _check_kernel(number, "cuda", (t, h, dv, d_rope), dtype)
    _check_kernel(501, "cuda", (70001, 1, 16, 8), torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do_and_no_rows(backend: str, device: str) -> None:
    out = torch.randn(2, 3, 8, device=device)
    assert inverse_rope_gate(out, None, None, d_rope=4, backend=backend) is out
    for t, h in ((0, 3), (2, 0)):
        empty = torch.empty(t, h, 8, device=device, requires_grad=True)
        gate = torch.empty(t, h, device=device, requires_grad=True)
        angles = _angles(t, 4, device)
        result = inverse_rope_gate(empty, angles, gate, d_rope=4, backend=backend)
        result.sum().backward()
        assert result.shape == (t, h, 8)
        assert gate.grad is not None
        assert gate.grad.shape == (t, h)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_each_other(backend: str, device: str) -> None:
    out, gate = torch.randn(4, 3, 16, device=device), torch.randn(4, 3, device=device)
    angles, order = _angles(4, 8, device), torch.tensor([2, 0, 3, 1], device=device)
    want = inverse_rope_gate(out, angles, gate, d_rope=8, backend=backend)
    other = Rotation(*(a[order] for a in angles))
    got = inverse_rope_gate(out[order], other, gate[order], d_rope=8, backend=backend)
    assert torch.equal(got, want[order])
    out[0, 1, 2] = math.nan
    out[1] = math.nan
    bad = inverse_rope_gate(out, angles, gate, d_rope=8, backend=backend)
    assert bad[1].isnan().all()
    assert bad[0].isnan().nonzero().tolist() == [[1, 2]]
    assert torch.equal(bad[2:], want[2:])


@pytest.mark.triton
@pytest.mark.parametrize("device", DEVICES)
def test_heads_beyond_32_bits(device: str) -> None:
    # head 2 and its gate lie 2^31 numbers behind head 0; nothing else is touched of the memory
    stride = 2**30 + 8
    size = 2 * stride + 32
    if device == "cpu":
        flat = torch.frombuffer(mmap.mmap(-1, 2 * size), dtype=torch.bfloat16)
    else:
        flat = torch.zeros(size, dtype=torch.bfloat16, device=device)
    near = torch.randn(1, 3, 16).to(device, torch.bfloat16)
    near_gate = torch.randn(1, 3).to(device, torch.bfloat16)
    far = flat.as_strided(near.shape, (size, stride, 1)).copy_(near)
    far_gate = flat.as_strided(near_gate.shape, (size, stride), 16).copy_(near_gate)
    angles, grad = _angles(1, 8, device), torch.randn(1, 3, 16).to(near)
    results = []
    for out, gate in ((near, near_gate), (far, far_gate)):
        result = inverse_rope_gate(out, angles, gate, d_rope=8, backend="triton")
        backward = torch.ops.model1.inverse_rope_gate_backward
        results.append([result, *backward(grad, out, *angles, gate, "triton")])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_describes_itself_to_pytorch(backend: str, device: str) -> None:
    out = torch.randn(2, 3, 8, device=device, requires_grad=True)
    gate = torch.randn(2, 3, device=device, requires_grad=True)
    cos, sin = _angles(2, 4, device)
    op = torch.ops.model1.inverse_rope_gate.default
    for arguments in ((cos, sin, gate), (None, None, gate), (cos, sin, None)):
        torch.library.opcheck(op, (out, *arguments, INVERSE_ROPE_GATE.resolve(backend, out.device)))


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_under_torch_compile(backend: str, device: str) -> None:
    angles = _angles(2, 4, device)

    def step(out: Tensor, gate: Tensor) -> Tensor:
        result = inverse_rope_gate(2 * out, angles, gate, d_rope=4, backend=backend)
        return result.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, device=device)
    grads = []
    for run in (step, compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        run(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for want, got in zip(*grads, strict=True):
        assert want is not None
        assert torch.equal(want, got)


GOOD: dict[str, Any] = {
    "out": torch.ones(2, 3, 8),
    "rotation": Rotation(torch.ones(2, 4), torch.ones(2, 4)),
    "gate": torch.ones(2, 3),
    "d_rope": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.ones(2, 8)}, r"out must be \[t, h, dv\], got \[2, 8\]"),
        ({"out": torch.ones(2, 3, 8).long()}, "out must be bfloat16, .*got torch.int64"),
        ({"out": torch.ones(2, 8, 3).mT}, r"contiguous along its last axis, got .*\(24, 1, 3\)"),
        ({"d_rope": 3}, r"d_rope must be even and in 2\.\.8, got 3"),
        ({"d_rope": 10}, r"d_rope must be even and in 2\.\.8, got 10"),
        ({"d_rope": 2}, r"rotation\.cos must be \[2, 2\] float32, got \[2, 4\]"),
        ({"gate": torch.ones(3, 2)}, r"gate must be \[2, 3\] floating point, got \[3, 2\]"),
        ({"gate": torch.ones(2, 3, device="meta")}, "gate must be on out's device cpu, got meta"),
        ({"backend": "cuda"}, "backend must be one of auto, ref, triton"),
    ],
)
def test_bad_arguments_name_value_and_rule(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, BackendUnavailable), match=message):
        inverse_rope_gate(**(GOOD | change))
