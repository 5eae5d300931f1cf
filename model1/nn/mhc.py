"""Hyper-connection weights of one sublayer, and of the exit."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.layers import RmsNorm, new_weight
from model1.ops.mhc import (
    MhcCoefficients,
    mhc_coefficients,
    mhc_head,
    mhc_write_back,
)
from model1.ops.mhc.chain import mhc_collapse_norm, mhc_enter, mhc_seam

ALPHA_INIT = 0.01  # arXiv 2512.24880, initial gate of the input-dependent part


class Start(NamedTuple):
    """What a sublayer reads, and what its result is written back with."""

    u: Tensor  # [t, c], normalised
    post: Tensor  # [t, n] fp32
    comb: Tensor  # [t, n, n] fp32


_Weights = TypeVar("_Weights", MhcCoefficients, Start)


class HyperConnection(nn.Module):
    """Collapse the streams before a sublayer and write its result back after it."""

    group: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mhc is not None
        n = config.mhc.hc_mult
        self.iters, self.eps = config.mhc.hc_sinkhorn_iters, config.mhc.hc_eps
        self.norm_eps = config.rms_norm_eps
        width = n * config.hidden_size
        self.fn = new_weight(n * n + 2 * n, width, std=width**-0.5)
        self.scale = nn.Parameter(torch.full((3,), ALPHA_INIT))
        diagonal = [config.mhc.res_init if i == j else 0.0 for i in range(n) for j in range(n)]
        self.base = nn.Parameter(torch.tensor([0.0] * (2 * n) + diagonal))
        group = [0] * n + [1] * n + [2] * (n * n)
        self.register_buffer("group", torch.tensor(group), persistent=False)
        self.worst_error: Tensor | None = None  # a tensor while `Model.diagnostics` measures

    def coefficients(self, x: Tensor) -> MhcCoefficients:
        """Mixing weights from the streams x [t, n, c]."""
        weights = mhc_coefficients(
            x, self.fn, self._column_scale(), self.base,
            iters=self.iters, eps=self.eps, norm_eps=self.norm_eps,
        )  # fmt: skip
        return self._noted(weights)

    def enter(self, x: Tensor, norm: RmsNorm) -> tuple[Tensor, Start]:
        """x [t, n, c] to be written back to, and what this sublayer starts from on it."""
        x, *start = mhc_enter(
            x, self.fn, self._column_scale(), self.base, norm.weight,
            iters=self.iters, eps=self.eps, norm_eps=self.norm_eps,
        )  # fmt: skip
        return x, self._noted(Start(*start))

    def enter_after(
        self, x: Tensor, y: Tensor, start: Start, norm: RmsNorm
    ) -> tuple[Tensor, Start]:
        """The same on the streams that the sublayer before, which began from start, makes of y."""
        x, *new = mhc_seam(
            x, y, start.post, start.comb, self.fn, self._column_scale(), self.base, norm.weight,
            iters=self.iters, eps=self.eps, norm_eps=self.norm_eps,
        )  # fmt: skip
        return x, self._noted(Start(*new))

    def write_back(self, x: Tensor, y: Tensor, weights: MhcCoefficients | Start) -> Tensor:
        """New streams [t, n, c] from the sublayer's output y [t, c]."""
        return mhc_write_back(x, y, weights.post, weights.comb)

    def _column_scale(self) -> Tensor:
        # the gradient of index_select adds in no fixed order on a GPU, that of an index does
        is_trained = torch.is_grad_enabled()
        return self.scale[self.group] if is_trained else self.scale.index_select(0, self.group)

    def _noted(self, weights: _Weights) -> _Weights:
        if self.worst_error is not None:
            self.worst_error = torch.maximum(self.worst_error, sinkhorn_error(weights))
        return weights


class HyperHead(nn.Module):
    """Learned collapse of the streams before the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mhc is not None
        n = config.mhc.hc_mult
        self.eps, self.norm_eps = config.mhc.hc_eps, config.rms_norm_eps
        width = n * config.hidden_size
        self.fn = new_weight(n, width, std=width**-0.5)
        self.scale = nn.Parameter(torch.full((1,), ALPHA_INIT))
        self.base = nn.Parameter(torch.zeros(n))

    def weights(self, x: Tensor) -> Tensor:
        """What the streams x [t, n, c] are collapsed with, [t, n]."""
        return mhc_head(x, self.fn, self.scale, self.base, eps=self.eps, norm_eps=self.norm_eps)

    def forward(self, x: Tensor, norm: RmsNorm) -> Tensor:
        """Streams [t, n, c] to [t, c], normalised."""
        return mhc_collapse_norm(x, self.weights(x), norm.weight, norm_eps=norm.eps)[0]


def sinkhorn_error(weights: MhcCoefficients | Start) -> Tensor:
    """Largest distance of any row or column sum of comb from 1, a scalar for the training log."""
    rows = (weights.comb.sum(dim=-1) - 1.0).abs().amax()
    columns = (weights.comb.sum(dim=-2) - 1.0).abs().amax()
    return torch.maximum(rows, columns)
