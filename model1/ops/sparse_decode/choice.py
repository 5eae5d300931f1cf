"""Which calls the Hopper kernel takes, and for which of them it is the faster one."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.backend import Operator
from model1.ops.kv_cache import KVLayout

LAYOUT = KVLayout("model1_fp8", d_nope=448, d_rope=64)
_HEADS = 64  # of a program

# The portable kernel is faster for few rows. On an H200 of 2026-12-01, lists of 640 to 1,152 slots
# and 64 or 128 heads: 4 to 8 programs, 0.8 to 1.04 of its time; 128 and more, 1.1 to 1.6. What lies
# between was not measured.
_MIN_PROGRAMS = 128
_MIN_HEADS = 33
_MIN_ENTRIES = 512


def hopper_call_refusal(layout: KVLayout, dtype: torch.dtype, value_dim: int) -> str | None:
    """Why the Hopper kernel cannot take such a call, or None if it can."""
    if layout != LAYOUT:
        got = f"{layout.name} {layout.d_nope} + {layout.d_rope}"
        return f"takes model1_fp8 rows of 448 + 64 channels, got {got}"
    if dtype != torch.bfloat16:
        return f"takes bfloat16 queries, got {dtype}"
    if value_dim != LAYOUT.d:
        return f"gives values of {LAYOUT.d} channels, value_dim is {value_dim}"
    return None


def hopper_wins(rows: int, h: int, entries: int) -> bool:
    """Whether it is the faster kernel for `rows` queries of h heads over lists of `entries`."""
    programs = rows * -(-h // _HEADS)
    return programs >= _MIN_PROGRAMS and h >= _MIN_HEADS and entries >= _MIN_ENTRIES


def choose_backend(
    operator: Operator, backend: str, q: Tensor, topk_indices: Tensor,
    extra_topk_indices: Tensor | None, layout: KVLayout, value_dim: int, deterministic: bool,
) -> str:  # fmt: skip
    """What `resolve` says, and under "auto" `hopper` where that is the faster kernel."""
    chosen = operator.resolve(backend, q.device)
    refusal = hopper_call_refusal(layout, q.dtype, value_dim)
    if chosen == "hopper" and refusal is not None:
        raise BackendUnavailable(f"sparse_decode/hopper {refusal}")
    # a deterministic row must not learn from the choice how many others there are
    if backend != "auto" or chosen != "triton" or deterministic or refusal is not None:
        return chosen
    entries = topk_indices.shape[-1]
    entries += 0 if extra_topk_indices is None else extra_topk_indices.shape[-1]
    wins = hopper_wins(q.shape[0] * q.shape[1], q.shape[2], entries)
    return "hopper" if wins and operator.offers_hopper(q.device) else chosen
