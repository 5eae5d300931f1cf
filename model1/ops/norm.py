"""Root-mean-square normalisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x**2, last axis) + eps) * weight, in the dtype of x; weight None means 1.

    x: [..., c] floating point, 16 bits computed in fp32 and rounded once; leading axes may be
    empty. weight: [c] of any floating dtype, rounded to that of x first. A NaN makes its row NaN,
    an infinity itself NaN and the rest of its row 0. Differentiable. Source: arXiv 1910.07467.
    """
    weight = None if weight is None else weight.to(x.dtype)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
