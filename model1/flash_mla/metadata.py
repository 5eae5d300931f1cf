"""The holder that FlashMLA passes from call to call, and the two ways in which it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedConfig:
    """What must stay the same while a holder is in use."""

    b: int
    s_q: int
    h_q: int
    page_block_size: int
    h_k: int
    causal: bool
    is_fp8_kvcache: bool
    topk: int | None
    extra_page_block_size: int | None
    extra_topk: int | None


@dataclass
class FlashMLASchedMeta:
    """What `get_mla_metadata` returns; the first decode call fills in `config`.

    The kernels need no schedule: `tile_scheduler_metadata` and `num_splits` stay None and exist
    for code that names them.
    """

    have_initialized: bool = False
    config: SchedConfig | None = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None

    def accept(self, config: SchedConfig) -> None:
        """Remember the first config; raise AssertionError for a later one that differs."""
        if self.config is None:
            self.config, self.have_initialized = config, True
        if self.config == config:
            return
        pairs = (
            (f.name, getattr(self.config, f.name), getattr(config, f.name)) for f in fields(config)
        )
        changed = [f"{name} = {first}, got {now}" for name, first, now in pairs if first != now]
        raise AssertionError(f"the metadata was made for {', '.join(changed)}")


def get_mla_metadata(*args: object, **kwargs: object) -> tuple[FlashMLASchedMeta, None]:
    """A fresh holder for `flash_mla_with_kvcache`, and None for its `num_splits`.

    Every argument is ignored; older callers pass lengths and head counts.
    """
    return FlashMLASchedMeta(), None


def require(condition: bool, message: str) -> None:
    """Raise AssertionError, as FlashMLA does, also under `python -O`."""
    if not condition:
        raise AssertionError(message)


def require_entries(name: str, indices: Tensor) -> None:
    """Raise ValueError for lists without room, which FlashMLA refuses; our operators take them."""
    if indices.dim() > 0 and indices.shape[-1] == 0:
        raise ValueError(f"{name} must have topk > 0, got {list(indices.shape)}")


@contextmanager
def refusals_as_runtime_errors() -> Iterator[None]:
    """What our operators refuse with ValueError, FlashMLA refuses with RuntimeError."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(str(error)) from error
