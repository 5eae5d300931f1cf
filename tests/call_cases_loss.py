"""Calls of the loss, for `call_cases` (`PARTS`: name to what makes up a `Call`) and plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sparse_decode_cases import DEVICE, DTYPE
from torch import Tensor

from model1.ops.cross_entropy import linear_cross_entropy

BIG = DEVICE == "cuda"


def _linear_cross_entropy(seed: int) -> dict[str, Any]:
    """Two chunks of different sizes, an ignored target and a vocabulary of no round size."""
    torch.manual_seed(seed)
    n, c, vocab = (300, 768, 50257) if BIG else (5, 16, 70)
    targets = torch.randint(vocab, (n,))
    targets[seed] = -100
    tensors = {
        "hidden": torch.randn(n, c).to(DEVICE, DTYPE),
        "weight": (torch.randn(vocab, c) * c**-0.5).to(DEVICE),
        "targets": targets.to(DEVICE),
    }

    def run(**tensors: Tensor) -> Tensor:
        return linear_cross_entropy(**tensors, chunk_tokens=2 * n // 3, backend="triton")

    return {"run": run, "tensors": tensors, "differentiable": ("hidden", "weight")}


def learned(backend: str, device: str) -> list[Tensor]:
    """Loss and gradients, for plug-ins: chunks, an ignored target."""
    leaves = [torch.randn(shape).to(device).requires_grad_() for shape in ((7, 8), (11, 8))]
    targets = torch.tensor([0, 10, -100, 3, 4, 5, 6], device=device)
    loss = linear_cross_entropy(*leaves, targets, chunk_tokens=3, backend=backend)
    return [loss[None].detach(), *torch.autograd.grad(0.3 * loss, leaves)]


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {"linear_cross_entropy": _linear_cross_entropy}
