"""The Engram gate and short convolution against fp64 loops, with their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.ops.engram import engram_gate, engram_short_conv

EPS = 1e-20


def gate_inputs(
    num_tokens: int, num_streams: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = torch.randn(num_tokens, num_streams, dim, dtype=dtype)
    key = torch.randn(num_tokens, num_streams, dim, dtype=dtype)
    value = torch.randn(num_tokens, dim, dtype=dtype)
    return h, key, value, 1 + 0.3 * torch.randn(num_streams, dim, dtype=dtype)


def naive_norm(x: list[float], eps: float) -> list[float]:
    rms = math.sqrt(sum(v * v for v in x) / len(x) + eps)
    return [v / rms for v in x]


def naive_gate(h: list[float], key: list[float], weight: list[float], signed_sqrt: bool) -> float:
    products = zip(naive_norm(h, EPS), weight, naive_norm(key, EPS), strict=True)
    s = sum(a * w * b for a, w, b in products) / math.sqrt(len(h))
    if signed_sqrt:
        s = math.copysign(math.sqrt(max(abs(s), 1e-6)), s) if s else 0.0
    return 1 / (1 + math.exp(-s))


@given(
    num_tokens=st.integers(0, 4),
    num_streams=st.integers(1, 4),
    dim=st.integers(1, 40),
    signed_sqrt=st.booleans(),
    exponent=st.integers(-6, 6),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_gate_equals_a_float64_loop(
    num_tokens: int, num_streams: int, dim: int, signed_sqrt: bool, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    h, key, value, weight = gate_inputs(num_tokens, num_streams, dim)
    h = h * 10.0**exponent
    out, gate = engram_gate(h, key, value, weight, eps=EPS, signed_sqrt=signed_sqrt)
    assert out.shape == h.shape
    assert gate.shape == h.shape[:2]
    for i in range(num_tokens):
        for j in range(num_streams):
            row = (h[i, j].tolist(), key[i, j].tolist(), weight[j].tolist())
            expected = naive_gate(*row, signed_sqrt)
            # Near s = 0 the root turns fp32 rounding of s into sqrt(1e-7) at most.
            assert gate[i, j].item() == pytest.approx(expected, abs=1e-4)
            assert torch.equal(out[i, j], gate[i, j] * value[i])


def test_gate_is_accurate_away_from_zero() -> None:
    h, key, value, weight = gate_inputs(300, 4, 64)
    exact = engram_gate(*(x.double() for x in (h, key, value, weight)), eps=EPS)
    out, gate = engram_gate(h, key, value, weight, eps=EPS)
    assert exact[1].dtype == torch.float64
    away = (exact[1] - 0.5).abs() > 0.02
    assert away.float().mean() > 0.8
    assert (gate - exact[1])[away].abs().max() < 1e-6
    assert (out - exact[0])[away].abs().max() < 5e-6


def test_bf16_is_fp32_arithmetic_rounded_once() -> None:
    h, key, value, weight = gate_inputs(9, 4, 64, torch.bfloat16)
    out, gate = engram_gate(h, key, value, weight, eps=EPS)
    wide_out, wide_gate = engram_gate(
        h.float(), key.float(), value.float(), weight.float(), eps=EPS
    )
    assert (out.dtype, gate.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(gate, wide_gate)
    assert torch.equal(out, wide_out.to(torch.bfloat16))


@pytest.mark.parametrize("signed_sqrt", [True, False])
def test_gate_gradient_against_finite_differences(signed_sqrt: bool) -> None:
    h, key, value, weight = gate_inputs(3, 2, 7, torch.float64)
    key = 0.7 * h + 0.3 * key  # keeps every score away from the clamp and from zero
    inputs = [x.requires_grad_() for x in (h, key, value, weight)]

    def op(*args: Tensor) -> tuple[Tensor, Tensor]:
        return engram_gate(*args, eps=1e-6, signed_sqrt=signed_sqrt)

    assert torch.autograd.gradcheck(op, inputs)


def test_gate_gradient_follows_the_published_rule() -> None:
    """d gate = <d out, v>;  du = d gate * gate (1 - gate);  ds = du / (2 sqrt(|s|))."""
    h, key, value, weight = gate_inputs(5, 3, 16, torch.float64)
    weight.requires_grad_()
    out, gate = engram_gate(h, key, value, weight, eps=EPS)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    normed_h = h / h.square().mean(-1, keepdim=True).sqrt()
    normed_key = key / key.square().mean(-1, keepdim=True).sqrt()
    s = (normed_h * normed_key * weight.detach()).sum(-1) / 4
    grad_gate = (grad_out * value[:, None]).sum(-1)
    grad_s = grad_gate * gate * (1 - gate) * 0.5 / s.abs().sqrt()
    expected = (grad_s[..., None] * normed_h * normed_key / 4).sum(0)
    torch.testing.assert_close(weight.grad, expected.detach(), rtol=1e-10, atol=1e-12)


def test_no_gradient_where_the_score_is_clamped() -> None:
    h, key, value, weight = gate_inputs(4, 2, 8)
    h[0], key[0] = torch.eye(8)[:2], torch.eye(8)[2:4]  # s = 0
    h[1], key[1] = torch.eye(8)[:2], torch.eye(8)[2:4] + 1e-7 * torch.eye(8)[:2]  # s below 1e-6
    inputs = [x.requires_grad_() for x in (h, key, value, weight)]
    out, gate = engram_gate(*inputs, eps=EPS)
    out.sum().backward()
    assert h.grad is not None
    assert key.grad is not None
    assert value.grad is not None
    assert (gate[0] == 0.5).all()
    torch.testing.assert_close(gate[1], torch.full((2,), 1 / (1 + math.exp(-1e-3))))
    for grad in (h.grad, key.grad):
        assert (grad[:2] == 0).all()
        assert (grad[2:].abs().sum(-1) > 0).all()
    torch.testing.assert_close(value.grad[0], torch.ones(8))


@pytest.mark.parametrize("eps", [1e-20, 1e-6])
@pytest.mark.parametrize("dim", [1, 8, 512])
def test_zero_rows_give_half_and_finite_gradients(eps: float, dim: int) -> None:
    h, key, value, weight = gate_inputs(3, 2, dim)
    h[0], key[1], h[2], key[2] = 0, 0, 0, 0
    inputs = [x.requires_grad_() for x in (h, key, value, weight)]
    out, gate = engram_gate(*inputs, eps=eps)
    out.sum().backward()
    assert (gate == 0.5).all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


def test_dead_tokens_pass_nothing() -> None:
    h, key, value, weight = gate_inputs(4, 2, 8)
    h.requires_grad_()
    live = torch.tensor([True, False, True, False])
    out, gate = engram_gate(h, key, value, weight, eps=EPS, live=live)
    open_out, open_gate = engram_gate(h, key, value, weight, eps=EPS)
    assert torch.equal(out[live], open_out[live])
    assert torch.equal(gate[live], open_gate[live])
    assert (out[~live] == 0).all()
    out.sum().backward()
    assert h.grad is not None
    assert (h.grad[~live] == 0).all()


@pytest.mark.parametrize("dim", [5, 64, 512])
def test_gate_of_a_token_does_not_depend_on_the_batch(dim: int) -> None:
    h, key, value, weight = gate_inputs(37, 4, dim)
    out, gate = engram_gate(h, key, value, weight, eps=EPS)
    order = torch.randperm(37)
    shuffled = engram_gate(h[order], key[order], value[order], weight, eps=EPS)
    assert torch.equal(shuffled[0], out[order])
    assert torch.equal(shuffled[1], gate[order])
    strided = engram_gate(h.mT.contiguous().mT, key.mT.contiguous().mT, value, weight, eps=EPS)
    torch.testing.assert_close(strided[0], out)
    alone = engram_gate(h[5:6], key[5:6], value[5:6], weight, eps=EPS)
    assert torch.equal(alone[0][0], out[5])


def test_gate_traces_without_a_graph_break() -> None:
    compiled = torch.compile(engram_gate, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_tokens in (3, 6):
        inputs = gate_inputs(num_tokens, 2, 8, torch.bfloat16)
        h = inputs[0].requires_grad_()
        out, gate = engram_gate(*inputs, eps=EPS)
        (expected,) = torch.autograd.grad(out.float().sum(), h)
        compiled_out, compiled_gate = compiled(*inputs, eps=EPS)
        (found,) = torch.autograd.grad(compiled_out.float().sum(), h)
        torch.testing.assert_close(compiled_gate, gate)
        torch.testing.assert_close(compiled_out, out)
        torch.testing.assert_close(found, expected)


def test_bad_gate_input_is_named() -> None:
    h, key, value, weight = gate_inputs(3, 2, 8)
    with pytest.raises(ValueError, match=r"h must be \[t, n, d\], got shape \(6, 8\)"):
        engram_gate(h.view(6, 8), key, value, weight, eps=EPS)
    with pytest.raises(ValueError, match=r"key must have shape \(3, 2, 8\), got \(3, 1, 8\)"):
        engram_gate(h, key[:, :1], value, weight, eps=EPS)
    with pytest.raises(ValueError, match=r"value must have shape \(3, 8\), got \(2, 8\)"):
        engram_gate(h, key, value[:2], weight, eps=EPS)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(2, 8\), got \(8,\)"):
        engram_gate(h, key, value, weight[0], eps=EPS)
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        engram_gate(h, key, value, weight, eps=0.0)
    with pytest.raises(ValueError, match=r"live must be bool, got torch\.float32"):
        engram_gate(h, key, value, weight, eps=EPS, live=torch.ones(3))


def conv_window(x: Tensor, num_taps: int, dilation: int) -> Tensor:
    """[t, K, c] windows of one whole sequence [t, c], oldest tap first, zeros before its start."""
    back = [dilation * (num_taps - 1 - tap) for tap in range(num_taps)]
    shifted = [torch.cat([torch.zeros_like(x[:n]), x])[: len(x)] for n in back]
    return torch.stack(shifted, dim=1)


@given(
    num_tokens=st.integers(1, 12),
    num_streams=st.integers(1, 3),
    dim=st.integers(1, 6),
    num_taps=st.integers(1, 4),
    dilation=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_conv_equals_a_causal_dilated_loop(
    num_tokens: int, num_streams: int, dim: int, num_taps: int, dilation: int, seed: int
) -> None:
    torch.manual_seed(seed)
    channels = num_streams * dim
    x = torch.randn(num_tokens, channels, dtype=torch.float64)
    weight = torch.randn(channels, num_taps, dtype=torch.float64)
    norm_weight = torch.randn(num_streams, dim, dtype=torch.float64)
    window = conv_window(x, num_taps, dilation)
    out = engram_short_conv(window, weight, norm_weight, eps=1e-5)
    normed = [
        [v for j in range(num_streams) for v in naive_norm(row[j * dim : (j + 1) * dim], 1e-5)]
        for row in x.tolist()
    ]
    scale = norm_weight.flatten().tolist()
    for t in range(num_tokens):
        for c in range(channels):
            total = 0.0
            for tap in range(num_taps):
                source = t - dilation * (num_taps - 1 - tap)
                if source >= 0:
                    total += float(weight[c, tap]) * normed[source][c] * scale[c]
            expected = total / (1 + math.exp(-total))
            assert out[t, c].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_conv_of_a_chunk_is_bitwise_that_of_the_sequence() -> None:
    x, weight, norm_weight = torch.randn(21, 24), torch.randn(24, 4), torch.randn(4, 6)
    window = conv_window(x, 4, 3)
    whole = engram_short_conv(window, weight, norm_weight, eps=1e-5)
    for cut in ((0, 1), (1, 8), (8, 20), (20, 21)):
        part = engram_short_conv(window[slice(*cut)], weight, norm_weight, eps=1e-5)
        assert torch.equal(part, whole[slice(*cut)])
    order = torch.randperm(21)
    shuffled = engram_short_conv(window[order], weight, norm_weight, eps=1e-5)
    assert torch.equal(shuffled, whole[order])
    strided = engram_short_conv(window.mT.contiguous().mT, weight, norm_weight, eps=1e-5)
    torch.testing.assert_close(strided, whole)


def test_conv_is_silent_with_zero_weights_and_without_tokens() -> None:
    norm_weight = torch.ones(2, 4)
    x = torch.randn(5, 3, 8, dtype=torch.bfloat16)
    out = engram_short_conv(x, torch.zeros(8, 3), norm_weight, eps=1e-5)
    assert out.dtype == torch.bfloat16
    assert (out == 0).all()
    assert engram_short_conv(x[:0], torch.ones(8, 3), norm_weight, eps=1e-5).shape == (0, 8)


def test_conv_gradient_against_finite_differences() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    norm_weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def op(x: Tensor, weight: Tensor, norm_weight: Tensor) -> Tensor:
        return engram_short_conv(conv_window(x, 3, 2), weight, norm_weight, eps=1e-5)

    assert torch.autograd.gradcheck(op, (x, weight, norm_weight))


def test_bad_conv_input_is_named() -> None:
    x, weight, norm_weight = torch.zeros(2, 3, 8), torch.zeros(8, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"x must be \[t, K, n\*d\] with K > 0"):
        engram_short_conv(x[:, :0], weight, norm_weight, eps=1e-5)
    with pytest.raises(ValueError, match=r"norm_weight must be \[n, d\], got shape \(8,\)"):
        engram_short_conv(x, weight, norm_weight.flatten(), eps=1e-5)
    with pytest.raises(ValueError, match=r"x must have shape \(2, 3, 8\), got \(2, 3, 7\)"):
        engram_short_conv(x[..., :7], weight, norm_weight, eps=1e-5)
    with pytest.raises(ValueError, match=r"weight must have shape \(8, 3\), got \(8, 2\)"):
        engram_short_conv(x, weight[:, :2], norm_weight, eps=1e-5)
    with pytest.raises(ValueError, match="eps must be positive, got -1"):
        engram_short_conv(x, weight, norm_weight, eps=-1.0)
