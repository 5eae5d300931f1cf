"""Dense attention over one shared latent: loops in fp64, sinks, empty rows, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, double_precision, naive_attention
from torch import Tensor

from model1.ops.dense_attention import dense_attention, flex
from model1.ops.dense_attention.ref import range_mask

INF = math.inf
Pair = tuple[Tensor, Tensor]


def inputs(
    t: int, h: int, s: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, kv and random visible ranges, some of them empty."""
    key_start, key_end = torch.randint(0, s + 1, (2, t)).sort(dim=0).values
    return torch.randn(t, h, d, dtype=dtype), torch.randn(s, d, dtype=dtype), key_start, key_end


def attend(q: Tensor, kv: Tensor, start: Tensor, end: Tensor, **options: Any) -> Pair:
    out, lse = dense_attention(q, kv, start, end, **options)
    assert lse is not None
    return out, lse


@given(
    t=st.integers(0, 4),
    h=st.integers(1, 3),
    s=st.integers(0, 7),
    d=st.integers(1, 9),
    with_sink=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_float64_loop(t: int, h: int, s: int, d: int, with_sink: bool, seed: int) -> None:
    torch.manual_seed(seed)
    q, kv, key_start, key_end = inputs(t, h, s, d)
    sink = torch.randn(h) * 3 if with_sink else None
    value_dim = int(torch.randint(1, d + 1, ()))
    got = attend(q, kv, key_start, key_end, value_dim=value_dim, softmax_scale=0.4, attn_sink=sink)
    visible = range_mask(s, key_start, key_end)
    want = naive_attention(q, kv, visible, value_dim=value_dim, scale=0.4, sink=sink)
    assert_near(got[0], want[0], 2e-5)
    assert_near(got[1], want[1], 2e-5)
    assert got[1].dtype == torch.float32


def test_in_double_precision_it_is_the_formula() -> None:
    q, kv, key_start, key_end = inputs(9, 3, 20, 12, torch.float64)
    sink = torch.randn(3, dtype=torch.float64)
    with double_precision():
        got = attend(q, kv, key_start, key_end, value_dim=8, softmax_scale=0.5, attn_sink=sink)
    visible = range_mask(20, key_start, key_end)
    want = naive_attention(q, kv, visible, value_dim=8, scale=0.5, sink=sink)
    assert_near(got[0], want[0], 1e-12)
    assert_near(got[1], want[1], 1e-12)


def test_a_row_without_keys_gives_zero_and_minus_infinity() -> None:
    q, kv, _, _ = inputs(3, 2, 5, 4)
    key_start, key_end = torch.tensor([0, 3, 5]), torch.tensor([0, 3, 5])
    for sink in (None, torch.zeros(2), torch.full((2,), INF), torch.full((2,), -INF)):
        out, lse = attend(q, kv, key_start, key_end, value_dim=4, softmax_scale=1.0, attn_sink=sink)
        assert torch.equal(out, torch.zeros(3, 2, 4))
        assert torch.equal(lse, torch.full((3, 2), -INF))


def test_an_infinite_sink_takes_all_or_nothing_and_stays_out_of_lse() -> None:
    q, kv, _, _ = inputs(3, 2, 5, 4)
    key_start, key_end = torch.zeros(3, dtype=torch.int64), torch.tensor([1, 3, 5])
    options = {"value_dim": 4, "softmax_scale": 1.0}
    plain = attend(q, kv, key_start, key_end, **options)
    none, lse_none = attend(
        q, kv, key_start, key_end, **options, attn_sink=torch.tensor([-INF, -INF])
    )
    assert torch.equal(none, plain[0])
    everything, lse = attend(
        q, kv, key_start, key_end, **options, attn_sink=torch.tensor([INF, -INF])
    )
    assert torch.equal(everything[:, 0], torch.zeros(3, 4))
    assert torch.equal(everything[:, 1], plain[0][:, 1])
    assert torch.equal(lse, plain[1])
    assert torch.equal(lse_none, plain[1])


def test_the_sink_is_a_factor_of_sigmoid_lse_minus_sink() -> None:
    q, kv, key_start, key_end = inputs(6, 3, 9, 4)
    sink = torch.randn(3) * 2
    options = {"value_dim": 3, "softmax_scale": 1.0}
    out, lse = attend(q, kv, key_start, key_end, **options)
    with_sink, _ = attend(q, kv, key_start, key_end, **options, attn_sink=sink)
    assert_near(with_sink, out * torch.sigmoid(lse - sink)[..., None], 1e-6)


def test_unseen_rows_change_no_bit() -> None:
    q, kv, key_start, key_end = inputs(12, 2, 16, 8)
    options = {"value_dim": 8, "softmax_scale": 1.0}
    want = attend(q, kv, key_start, key_end, **options)
    for i in range(12):
        hidden = ~range_mask(16, key_start[i : i + 1], key_end[i : i + 1])[0]
        hostile = kv.masked_fill(hidden[:, None], 1e30)
        got = attend(q, hostile, key_start, key_end, **options)
        assert torch.equal(got[0][i], want[0][i])
        assert torch.equal(got[1][i], want[1][i])


def test_huge_logits_do_not_overflow() -> None:
    kv = torch.eye(3)
    q = torch.tensor([[[2e4, 1e4, -1e4]], [[-2e4, -2e4, -3e4]]])
    ends = torch.tensor([3, 3])
    out, lse = attend(q, kv, torch.zeros_like(ends), ends, value_dim=3, softmax_scale=1.0)
    assert_near(out, torch.tensor([[[1.0, 0, 0]], [[0.5, 0.5, 0]]]), 2e-3)
    assert_near(lse, torch.tensor([[2e4], [-2e4 + math.log(2)]]), 2e-3)


@pytest.mark.parametrize("t", [1, 7, 33])
def test_permuting_the_queries_permutes_every_bit(t: int) -> None:
    q, kv, key_start, key_end = inputs(t, 3, 40, 16)
    order = torch.randperm(t)
    options = {"value_dim": 12, "softmax_scale": 0.3, "attn_sink": torch.randn(3)}
    want = attend(q, kv, key_start, key_end, **options)
    got = attend(q[order], kv, key_start[order], key_end[order], **options)
    assert torch.equal(got[0], want[0][order])
    assert torch.equal(got[1], want[1][order])


def test_strided_inputs_give_the_same_result() -> None:
    q, kv, key_start, key_end = inputs(5, 3, 8, 6)
    options = {"value_dim": 4, "softmax_scale": 1.0}
    want = attend(q, kv, key_start, key_end, **options)
    wide = torch.full((5, 3, 12), math.nan)
    wide[..., ::2] = q
    tall = torch.full((16, 6), math.nan)
    tall[1::2] = kv
    got = attend(wide[..., ::2], tall[1::2], key_start, key_end, **options)
    assert_near(got[0], want[0], 1e-6)
    assert_near(got[1], want[1], 1e-6)


def test_bf16_keeps_its_dtype_and_loses_only_rounding() -> None:
    q, kv, key_start, key_end = inputs(20, 3, 30, 16, torch.bfloat16)
    out, lse = attend(q, kv, key_start, key_end, value_dim=16, softmax_scale=0.25)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    visible = range_mask(30, key_start, key_end)
    want = naive_attention(q, kv, visible, value_dim=16, scale=0.25, sink=None)
    # Logits, probabilities and the result are rounded to 8 bits once each; values reach 4.
    assert_near(out, want[0], 4 * 3 * 2**-8)
    assert_near(lse, want[1], 2**-6)


@pytest.mark.parametrize("with_sink", [False, True])
def test_gradient_against_finite_differences(with_sink: bool) -> None:
    q, kv = inputs(4, 2, 5, 3, torch.float64)[:2]
    key_start, key_end = torch.tensor([0, 0, 2, 3]), torch.tensor([1, 5, 4, 3])  # the last: none
    sink = torch.randn(2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in ([q, kv, sink] if with_sink else [q, kv])]

    def op(q: Tensor, kv: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, kv, key_start, key_end, value_dim=2, softmax_scale=0.7, attn_sink=sink)
        return out, lse[:3]  # the last row's lse is -inf

    with double_precision():
        assert torch.autograd.gradcheck(op, leaves)


def test_fp32_gradient_is_near_the_fp64_one_and_finite_on_empty_rows() -> None:
    q, kv, key_start, key_end = inputs(30, 3, 40, 8)
    key_end[::7] = key_start[::7]
    upstream, sink = torch.randn(30, 3, 8), torch.randn(3)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, kv, sink)]
        out, _ = attend(
            *leaves[:2], key_start, key_end,
            value_dim=8, softmax_scale=0.5, attn_sink=leaves[2],
        )  # fmt: skip
        (out * upstream.to(dtype)).sum().backward()
        return [x.grad for x in leaves if x.grad is not None]

    with double_precision():
        exact = gradients(torch.float64)
    for got, want in zip(gradients(torch.float32), exact, strict=True):
        assert_near(got, want, 3e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("with_sink", [False, True])
def test_packed_training_attention_equals_the_reference(with_sink: bool) -> None:
    """The formula of the CUDA path, run uncompiled: document mask, sink, narrower value."""
    b, s, h, d, value_dim = 2, 140, 3, 32, 16
    q, kv = torch.randn(b, s, h, d), torch.randn(b, s, d)
    starts = torch.zeros(b, s, dtype=torch.int64)
    starts[0, 50:], starts[1, 1:], starts[1, 130:] = 50, 1, 130
    sink = torch.randn(h) if with_sink else None
    options = {"value_dim": value_dim, "softmax_scale": d**-0.5, "attn_sink": sink}
    got = flex.flex_dense_attention(q, kv, flex.packed_block_mask(starts), **options)
    ends = torch.arange(1, s + 1)
    for i in range(b):
        want, _ = attend(q[i], kv[i], starts[i], ends, **options)
        assert_near(got[i], want, 1e-5)


def test_the_denominator_can_be_left_out() -> None:
    q, kv, key_start, key_end = inputs(6, 3, 9, 4)
    options = {"value_dim": 4, "softmax_scale": 0.5, "attn_sink": torch.randn(3)}
    alone, none = dense_attention(q, kv, key_start, key_end, **options, return_lse=False)
    assert none is None
    assert torch.equal(alone, attend(q, kv, key_start, key_end, **options)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4)}, "q must be .* got 2 and 2 axes"),
        ({"kv": torch.zeros(3, 5)}, "share their last axis, got 4, 5"),
        ({"key_end": torch.zeros(3, dtype=torch.int64)}, r"must be \[2\]"),
        ({"value_dim": 0}, r"value_dim must be in 1\.\.4, got 0"),
        ({"value_dim": 5}, r"value_dim must be in 1\.\.4, got 5"),
        ({"attn_sink": torch.zeros(4)}, r"attn_sink must be \[3\], got \[4\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "q": torch.zeros(2, 3, 4), "kv": torch.zeros(3, 4),
        "key_start": torch.zeros(2, dtype=torch.int64),
        "key_end": torch.ones(2, dtype=torch.int64), "value_dim": 4, "softmax_scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        dense_attention(**{**good, **change})  # type: ignore[arg-type]
