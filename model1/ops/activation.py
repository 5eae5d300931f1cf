"""Gated activations of the feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(gate) * up; with a limit, gate is clamped from above and up on both sides first.

    gate, up: the same shape and floating dtype, which the result has; any shape, empty included.
    limit: None or positive. NaN stays NaN. Differentiable.
    Source: arXiv 2002.05202; of the clamps DeepSeek-V4 (arXiv 2606.19348), `swiglu_limit`.
    """
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
    return F.silu(gate) * up
