"""Double precision: formulas as plain loops, and a way to run the library itself in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def double_precision() -> Iterator[None]:
    """Within it `.float()` leaves fp64 alone.

    The library widens to fp32 with that call for softmax, norms and angles. With fp64 inputs the
    very same code then is exact enough to check a formula to 1e-9 and to differentiate it
    numerically.
    """
    with mock.patch.object(
        torch.Tensor,
        "float",
        lambda self: self if self.dtype == torch.float64 else self.to(torch.float32),
    ):
        yield


def naive_attention(
    q: Tensor, kv: Tensor, visible: Tensor, *, value_dim: int, scale: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [t, h, d] over the rows of kv [s, d] or [t, s, d] where visible [t, s]; out and lse."""
    t, h, _ = q.shape
    q, kv = q.double(), kv.double().expand(t, -1, -1)
    out = torch.zeros(t, h, value_dim, dtype=torch.float64)
    lse = torch.full((t, h), -math.inf, dtype=torch.float64)
    for i in range(t):
        keys = kv[i][visible[i]]
        for head in range(h):
            e = [math.exp(scale * (q[i, head] @ key).item()) for key in keys]
            extra = 0.0 if sink is None else math.exp(sink[head].item())
            for weight, key in zip(e, keys, strict=True):
                out[i, head] += weight / (sum(e) + extra) * key[:value_dim]
            if e:
                lse[i, head] = math.log(sum(e))
    return out, lse


def assert_near(got: Tensor, want: Tensor, limit: float) -> None:
    """Every element within `limit`, infinities equal; NaN never passes."""
    assert got.shape == want.shape
    same = got.double() == want.double()
    error = (got.double() - want.double()).abs().masked_fill(same, 0.0)
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= limit, f"differs by {worst:.3e}, at most {limit:.1e}"
