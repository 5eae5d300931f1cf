"""Rotated tails in Triton, behind a norm and without: fp64, gradients, strides, PyTorch's view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from backend_option import BACKENDS
from engram_cases import DEVICE, far
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.rope import (
    Rotation,
    apply_rope,
    norm_rotate_tail,
    rope_frequencies,
    rotate_tail,
    rotation,
)
from model1.ops.rope.ref import norm_rotate_tail_backward_ref
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
SHAPES = [  # shape, d_rope
    ((3, 2, 16), 4),
    ((1, 1, 2), 2),
    ((5, 24), 24),
    ((2, 5, 7), 6),
    ((2, 9, 512), 64),
    ((4, 100), 32),
]
if torch.cuda.is_available():
    SHAPES += [((301, 64, 512), 64), ((1025, 128, 64), 64), ((70001, 16), 8), ((65, 5, 192), 64)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def angles_of(t: int, d_rope: int) -> Rotation:
    angles = rotation(torch.randint(0, 100000, (t,)), rope_frequencies(d_rope, 10000.0))
    return Rotation(angles.cos.to(DEVICE), angles.sin.to(DEVICE))


def results(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Result and gradient of a call on x, which keeps its strides."""
    leaf = x.detach().requires_grad_()
    out = run(leaf)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(out))]


def call(
    angles: Rotation, backend: str, *, inverse: bool = False, has_norm: bool = False
) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        options = {"inverse": inverse, "backend": backend}
        if x.dtype == torch.float64:
            wide = Rotation(*(a.double() for a in angles))
            rotated = plain_tail(norm(x) if has_norm else x, wide, inverse)
        elif has_norm:
            rotated = norm_rotate_tail(x, angles, norm_eps=EPS, **options)
        else:
            rotated = rotate_tail(x, angles, **options)
        return rotated

    return run


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def plain_tail(x: Tensor, angles: Rotation, inverse: bool) -> Tensor:
    """In fp64, a pair as one complex number."""
    cos, sin = (a[..., 1::2] if x.dim() == 2 else a[:, None, 1::2] for a in angles)
    d_rope = angles.cos.shape[1]
    pair = torch.view_as_complex(x[..., -d_rope:].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pair * torch.complex(cos, -sin if inverse else sin))
    return torch.cat([x[..., :-d_rope], turned.flatten(-2)], dim=-1)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("number", range(len(SHAPES) * len(DTYPES)))
def test_equals_the_formula_in_float64(number: int, has_norm: bool) -> None:
    (shape, d_rope), dtype = SHAPES[number % len(SHAPES)], DTYPES[number // len(SHAPES)]
    x, grad = (torch.randn(shape).to(DEVICE, dtype) for _ in range(2))
    angles = angles_of(shape[0], d_rope)
    options = {"inverse": number % 2 == 1, "has_norm": has_norm}
    got = results(call(angles, "triton", **options), x, grad)
    baseline = results(call(angles, "ref", **options), x, grad)
    expected = results(call(angles, "ref", **options), x.double(), grad)
    for ours, base, y in zip(got, baseline, expected, strict=True):
        assert ours.dtype == dtype
        assert_close_rows(ours, base, y)
    if x.shape[-1] == d_rope and not has_norm:
        same = apply_rope(x, angles, inverse=options["inverse"], backend="triton")
        assert torch.equal(same, got[0])


def test_backward_reference_is_the_gradient_of_the_reference() -> None:
    x, grad, angles = torch.randn(5, 3, 24), torch.randn(5, 3, 24), angles_of(5, 8)
    angles = Rotation(angles.cos.cpu(), angles.sin.cpu())
    for inverse in (False, True):
        _, want = results(call(angles, "ref", inverse=inverse, has_norm=True), x, grad)
        got = norm_rotate_tail_backward_ref(grad, x, angles, inverse=inverse, norm_eps=EPS)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_inverse_turns_back_and_plain_channels_keep_every_bit() -> None:
    x, angles = torch.randn(5, 3, 24).to(DEVICE), angles_of(5, 8)
    before = x.clone()
    turned = rotate_tail(x, angles, backend="triton")
    assert torch.equal(x, before)
    assert torch.equal(turned[..., :16], x[..., :16])
    back = rotate_tail(turned, angles, inverse=True, backend="triton")
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_bf16_is_fp32_arithmetic_rounded_once() -> None:
    x, angles = torch.randn(9, 2, 48).to(DEVICE, torch.bfloat16), angles_of(9, 16)
    for has_norm in (False, True):
        run = call(angles, "triton", has_norm=has_norm)
        assert torch.equal(run(x), run(x.float()).bfloat16())


@pytest.mark.parametrize("has_norm", [False, True])
def test_tokens_and_heads_do_not_depend_on_each_other(has_norm: bool) -> None:
    x, grad = (torch.randn(5, 4, 40).to(DEVICE) for _ in range(2))
    angles = angles_of(5, 8)
    want = results(call(angles, "triton", has_norm=has_norm), x, grad)
    order = torch.tensor([3, 0, 4, 2, 1]).to(DEVICE)
    other = Rotation(angles.cos[order], angles.sin[order])
    got = results(call(other, "triton", has_norm=has_norm), x[order], grad[order])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b[order])
    few = Rotation(*(a[1:3] for a in angles))
    got = results(call(few, "triton", has_norm=has_norm), x[1:3], grad[1:3])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b[1:3])
    # of fewer heads the tile is another one, and with it the order of the norm's sums
    got = results(call(angles, "triton", has_norm=has_norm), x[:, 2:], grad[:, 2:])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a, b[:, 2:], rtol=1e-5 if has_norm else 0.0, atol=1e-6 * has_norm
        )
    x[3, 1, 39] = math.nan
    bad = call(angles, "triton", has_norm=has_norm)(x)
    wrong = bad.isnan().any(-1)
    assert wrong.nonzero().tolist() == [[3, 1]]
    assert torch.equal(bad[~wrong], want[0][~wrong])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (0, 2, 8), (3, 0, 8)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_nothing_gives_nothing(shape: tuple[int, ...], backend: str, has_norm: bool) -> None:
    x, angles = torch.zeros(shape).to(DEVICE), angles_of(shape[0], 4)
    for got in results(call(angles, backend, has_norm=has_norm), x, x):
        assert got.shape == shape


@pytest.mark.parametrize("has_norm", [False, True])
def test_strides_and_places_beyond_32_bits(has_norm: bool) -> None:
    x, grad = (torch.randn(3, 2, 24).to(DEVICE, torch.bfloat16) for _ in range(2))
    angles = angles_of(3, 8)
    run, stride = call(angles, "triton", has_norm=has_norm), 2**30 + 16
    want = results(run, x, grad)
    for lay_apart in (  # 4 GB each: one at a time
        lambda: x.mT.contiguous().mT,
        lambda: far(x, (stride, 24, 1)),
        lambda: far(x, (24, 2 * stride, 1)),
        lambda: torch.cat([x, x], dim=-1)[..., :24],
    ):
        for got, expected in zip(results(run, lay_apart(), grad), want, strict=True):
            assert torch.equal(got, expected)
    wide = torch.ones(1, 1, 1).to(grad).expand(3, 2, 24)
    for got, expected in zip(
        results(run, x, wide), results(run, x, torch.ones_like(x)), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_under_torch_compile(backend: str) -> None:
    x, angles = torch.randn(3, 2, 16).to(DEVICE), angles_of(3, 4)

    def step(x: Tensor) -> Tensor:
        out = norm_rotate_tail(2 * x, angles, norm_eps=EPS, backend=backend)
        return rotate_tail(out, angles, inverse=True, backend=backend).cos().sum()

    grads = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_bad_arguments_name_value_and_rule() -> None:
    x, angles = torch.zeros(2, 3, 8, device=DEVICE), angles_of(2, 4)
    cos, sin = angles
    for message, tensor, wrong in (
        (r"x must be \[t, d\] or \[t, h, d\] floating point, got \[8\]", x[0, 0], angles),
        (r"x must be .* got \[2, 3, 8\] torch\.int64", x.long(), angles),
        (r"x must be bfloat16, .* got torch\.float64", x.double(), angles),
        ("d_rope must be even and in 2..3, got 4", x[..., :3], angles),
        ("d_rope must be even and in 2..8, got 3", x, Rotation(cos[:, :3], sin[:, :3])),
        (r"rotation\.sin must be \[2, 4\], got \[1, 4\]", x, Rotation(cos, sin[:1])),
        (r"rotation\.cos must be float32 .* got torch\.float64", x, Rotation(cos.double(), sin)),
        (f"rotation.sin must be on {x.device}, got meta", x, Rotation(cos, sin.to("meta"))),
    ):
        with pytest.raises(ValueError, match=message):
            rotate_tail(tensor, wrong, backend="triton")
    with pytest.raises(BackendUnavailable, match="backend must be one of auto, ref, triton"):
        rotate_tail(x, angles, backend="cuda")
