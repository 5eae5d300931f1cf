"""Inputs of MHA prefill, and its formula and gradients in fp64: for interpreter and GPU tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from model1.testing.compare import assert_close_rows, delta_noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a kernel is compiled for."""

    h: int
    hkv: int
    d: int
    dv: int
    dtype: torch.dtype = torch.float32
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One call, a gradient of its output, and the lengths of the requests."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    q_lengths: list[int]
    k_lengths: list[int]
    softmax_scale: float
    causal: bool

    def arguments(self) -> dict[str, Any]:
        """Of `mha_prefill`; q, k and v as leaves."""
        device = self.q.device
        sums = [
            torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
            for lengths in (self.q_lengths, self.k_lengths)
        ]
        return {
            "q": self.q.detach().requires_grad_(),
            "k": self.k.detach().requires_grad_(),
            "v": self.v.detach().requires_grad_(),
            "cu_seqlens_q": sums[0],
            "cu_seqlens_k": sums[1],
            "max_seqlen_q": max([0, *self.q_lengths]),
            "max_seqlen_k": max([0, *self.k_lengths]),
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
        }


def check_batch_invariance(case: Case, run: Callable[[Case], dict[str, Tensor]]) -> None:
    """Results and gradients of a request have the same bits alone, reordered, with other mates.

    run: the five tensors by NAMES. The last mate is longer than all requests of the case.
    """
    q_rows, k_rows = (torch.arange(sum(x)).split(x) for x in (case.q_lengths, case.k_lengths))
    want, b, long = run(case), len(case.q_lengths), 50
    for order in (list(range(b))[::-1], [b - 1], [0, 0, *range(b)]):
        q_at, k_at = (torch.cat([x[i] for i in order]) for x in (q_rows, k_rows))
        rows = (q_at, k_at, k_at, q_at)
        tensors = [x[at] for x, at in zip((case.q, case.k, case.v, case.d_out), rows, strict=True)]
        tensors = [torch.cat([x, torch.ones_like(x[:1]).repeat(long, 1, 1)]) for x in tensors]
        lengths = [[*(x[i] for i in order), long] for x in (case.q_lengths, case.k_lengths)]
        got = run(Case(*tensors, *lengths, case.softmax_scale, case.causal))
        for name in NAMES:
            at = k_at if name in ("dk", "dv") else q_at
            assert torch.equal(got[name][: len(at)], want[name][at]), name


def random_case(
    shape: Shape, q_lengths: list[int], k_lengths: list[int], seed: int, device: str = "cpu"
) -> Case:
    """Normal numbers in slices of larger tensors, with NaN around them."""
    torch.manual_seed(seed)
    t, s = sum(q_lengths), sum(k_lengths)

    def slack(*sizes: int) -> Tensor:
        n, h, d = sizes
        wide = torch.full((n + 1, h + 1, d + 16), math.nan, dtype=shape.dtype, device=device)
        return wide[:n, :h, :d].copy_(torch.randn(sizes))

    return Case(
        q=slack(t, shape.h, shape.d),
        k=slack(s, shape.hkv, shape.d),
        v=slack(s, shape.hkv, shape.dv),
        d_out=torch.randn(t, shape.h, shape.dv).to(device, shape.dtype),
        q_lengths=q_lengths,
        k_lengths=k_lengths,
        softmax_scale=shape.d**-0.5,
        causal=shape.causal,
    )


NAMES = ("out", "lse", "dq", "dk", "dv")


def formula(case: Case) -> dict[str, Tensor]:
    """Results in fp64, and gradients by PyTorch's autograd."""
    leaves = [x.detach().double().requires_grad_() for x in (case.q, case.k, case.v)]
    results = [_attend(*one, case.causal, case.softmax_scale) for one in _requests(case, leaves)]
    out, lse = (torch.cat([result[i] for result in results]) for i in (0, 2))
    gradients = torch.autograd.grad(out, leaves, case.d_out.double())
    return dict(zip(NAMES, (out.detach(), lse, *gradients), strict=True))


def rounded_formula(case: Case) -> dict[str, Tensor]:
    """The same in plain PyTorch, with products, probabilities and their slopes in q's dtype.

    dq_noise, dk_noise: what the roundings of out and ds do to the rows of the gradients.
    """
    d_outs = case.d_out.split(case.q_lengths)
    parts = []
    for (q, k, v), d_out in zip(_requests(case, [case.q, case.k, case.v]), d_outs, strict=True):
        out, weights, lse = _attend(q, k, v, case.causal, case.softmax_scale)
        k_h, v_h = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        delta = (out.float() * d_out.float()).sum(-1, keepdim=True)
        d_weights = torch.einsum("nhd,shd->nhs", d_out, v_h).float()
        slope = (weights.float() * (d_weights - delta) * case.softmax_scale).to(q.dtype)
        dk, dv = (
            torch.einsum("nhs,nhd->shd", slope, q),
            torch.einsum("nhs,nhd->shd", weights, d_out),
        )
        heads = (k.shape[1], -1)
        noise = delta_noise(out, d_out, weights, d_weights) * case.softmax_scale
        if q.dtype == torch.float32:  # sums of dv products are in no higher precision
            noise *= math.sqrt(v.shape[2] / 2)
        dq_noise = noise * torch.einsum("nhs,shd->nhd", weights, k_h).double().norm(dim=-1)
        # a row of dk may be one query times one number: ds, as rounded as delta made it
        ds_noise = torch.finfo(q.dtype).eps / 2 * slope.double()
        ds_noise = torch.hypot(noise[..., None] * weights.double(), ds_noise)
        dk_noise = (ds_noise * q.double().norm(dim=-1)[..., None]).square().sum(0)
        parts.append(
            (
                out, lse, torch.einsum("nhs,shd->nhd", slope, k_h),
                dk.unflatten(1, heads).sum(2), dv.unflatten(1, heads).sum(2),
                dq_noise, dk_noise.unflatten(0, heads).sum(1).sqrt().T,
            )
        )  # fmt: skip
    names = (*NAMES, "dq_noise", "dk_noise")
    return {name: torch.cat(x) for name, x in zip(names, zip(*parts, strict=True), strict=True)}


def _requests(case: Case, tensors: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    lengths = (case.q_lengths, case.k_lengths, case.k_lengths)
    return zip(*(x.split(n) for x, n in zip(tensors, lengths, strict=True)), strict=True)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One request: out, probabilities and lse."""
    n, s, device = len(q), len(k), q.device
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("nhd,shd->nhs", q, k).double() * scale
    num_keys = torch.full((n, 1), s, device=device)
    if causal:
        num_keys = num_keys - torch.arange(n - 1, -1, -1, device=device)[:, None]
    hidden = (torch.arange(s, device=device) >= num_keys)[:, None]
    is_empty = (num_keys <= 0)[..., None]
    lse = logits.detach().masked_fill(hidden, -math.inf).logsumexp(-1)
    # no gradient passes a row without keys: its softmax would be NaN
    weights = logits.masked_fill(hidden & ~is_empty, -math.inf).softmax(-1)
    weights = weights.masked_fill(is_empty, 0.0).to(v.dtype)
    return torch.einsum("nhs,shd->nhd", weights, v), weights, lse


def check(case: Case, got: dict[str, Tensor], what: str) -> None:
    """The tolerance rule of every kernel; what: named in the failure."""
    expected = formula(case)
    baseline = rounded_formula(case)
    for name, value in got.items():
        want, base = expected[name], baseline[name]
        try:
            if name == "lse":
                assert_close_rows(value[..., None], base[..., None], want[..., None])
            else:
                noise = baseline.get(f"{name}_noise", 0.0)
                assert_close_rows(value, base, want, noise=noise)
        except AssertionError as error:
            raise AssertionError(f"{what}, {name}: {error}") from None
    assert not got["out"][expected["lse"] == -math.inf].any(), what


def drawn_shape(seed: int) -> Shape:
    """Any heads and widths; each shape is some compilations."""
    draw = Random(seed)
    hkv = draw.choice([1, 2, 3, 5])
    return Shape(
        h=hkv * draw.choice([1, 2, 3, 7]),
        hkv=hkv,
        d=draw.choice([40, 72, 100, 160, 256]),
        dv=draw.choice([36, 64, 96, 200]),
        dtype=draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
        causal=draw.random() < 0.6,
    )


def drawn_case(shape: Shape, seed: int, *, longest: int, device: str) -> Case:
    """A random ragged batch; a fifth of the requests have no queries or no keys."""
    draw = Random(seed)
    b = draw.randint(1, 5)

    def length() -> int:
        return 0 if draw.random() < 0.1 else draw.randint(1, longest)

    return random_case(
        shape, [length() for _ in range(b)], [length() for _ in range(b)], seed, device
    )
