"""Calls of the small operators for `call_cases`: `PARTS` maps a name to what makes up a `Call`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sparse_decode_cases import DEVICE, DTYPE
from torch import Tensor

from model1.ops.activation import swiglu
from model1.ops.engram import engram_causal_conv
from model1.ops.norm import add_rms_norm
from model1.ops.rope import (
    Rotation,
    norm_rotate_tail,
    rope_frequencies,
    rotate_tail,
    rotation,
)

BIG = DEVICE == "cuda"
T = 5
Parts = dict[str, Any]


def _parts(run: Callable[..., Any], tensors: dict[str, Tensor], *differentiable: str) -> Parts:
    on_device = {name: x.to(DEVICE) for name, x in tensors.items()}
    return {"run": run, "tensors": on_device, "differentiable": differentiable}


def _rows(function: Callable[..., Any], names: str, **options: Any) -> Callable[[int], Parts]:
    """A norm or an activation of [t, c]."""

    def build(seed: int) -> Parts:
        torch.manual_seed(seed)
        c = 4096 if BIG else 40
        tensors = {name: torch.randn(T, c).to(DTYPE) for name in names.split()}
        if "weight" in tensors:
            tensors["weight"] = torch.rand(c)

        def run(**tensors: Tensor) -> Any:
            return function(**tensors, **options, backend="triton")

        return _parts(run, tensors, *tensors)

    return build


def _rotated(function: Callable[..., Any], **options: Any) -> Callable[[int], Parts]:
    def build(seed: int) -> Parts:
        torch.manual_seed(seed)
        h, d, d_rope = (64, 512, 64) if BIG else (2, 40, 8)
        angles = rotation(torch.randint(0, 100000, (T,)), rope_frequencies(d_rope, 10000.0))
        x = torch.randn(T, h, d).to(DTYPE)

        def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return function(x, Rotation(cos, sin), **options, backend="triton")

        return _parts(run, {"x": x, **angles._asdict()}, "x")

    return build


def _convolved(seed: int) -> Parts:
    torch.manual_seed(seed)
    n, d = (4, 4096) if BIG else (2, 40)
    lengths = [(3, 2), (1, 4), (5, 0)][seed]
    positions = torch.cat([torch.arange(length) for length in lengths])
    tensors = {"x": torch.randn(T, n * d).to(DTYPE), "positions": positions}
    weights = {"weight": torch.randn(n * d, 4), "norm_weight": torch.rand(n, d)}

    def run(**tensors: Tensor) -> Tensor:
        return engram_causal_conv(**tensors, dilation=1, eps=1e-5, backend="triton")

    return _parts(run, tensors | weights, "x", *weights)


PARTS: dict[str, Callable[[int], Parts]] = {
    "add_rms_norm": _rows(add_rms_norm, "x residual weight", eps=1e-6),
    "engram_causal_conv": _convolved,
    "swiglu": _rows(swiglu, "gate up", limit=1.0),
    "rotate_tail": _rotated(rotate_tail, inverse=True),
    "norm_rotate_tail": _rotated(norm_rotate_tail, norm_eps=1e-6),
}
