"""What a call of an operator is to tests that ask the same of all; `call_cases` has the calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Call:
    """run(**tensors) with kernels: a tensor, a tuple of them, or nothing but what it writes."""

    run: Callable[..., Any]
    tensors: dict[str, Tensor]
    differentiable: tuple[str, ...] = ()

    def results(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """What the call returns."""
        returned = self.run(**tensors)
        if returned is None:
            return []
        return [returned] if isinstance(returned, Tensor) else list(returned)


def call_of(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    *differentiable: str,
    backend: str = "triton",
) -> Call:
    """A public function on keyword arguments, tensors and others."""
    options = {name: x for name, x in arguments.items() if not isinstance(x, Tensor)}
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}

    def run(**tensors: Tensor) -> Any:
        return function(**tensors, **options, backend=backend)

    return Call(run=run, tensors=tensors, differentiable=differentiable)


def set_seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
