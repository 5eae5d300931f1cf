"""A measured call: what runs, what it costs, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Work:
    """A prepared call and its cost.

    bind: the call, of a module with the `flash_mla` interface. rivals: other ways to the same
    result, by name, each a function that prepares the call; they need no module. flop = 0 where
    products are not the point.
    """

    bind: Callable[[Any], Call]
    flop: float
    num_bytes: float  # that any implementation must move
    rivals: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    takes_peer: bool = True  # False: our own operator, whatever module it is bound to


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table; `build` allocates its inputs."""

    operator: str
    name: str
    build: Callable[[torch.device], Work]


def own_work(
    call: Call,
    flop: float,
    num_bytes: float,
    rivals: Mapping[str, Callable[[], Call]] | None = None,
) -> Work:
    """A call of our own operator, which the `flash_mla` interface does not have."""
    return Work(lambda _: call, flop, num_bytes, rivals or {}, takes_peer=False)
