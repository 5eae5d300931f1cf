"""Weight holders shared by all parts: linear map and normalisation in the activation's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model1.ops.norm import add_rms_norm, rms_norm

# Up to this many rows a product with 8-bit weights is bound by reading them; beyond, arithmetic
# decides and fp32 wins. AMD EPYC, 2 cores, torch 2.13, 2026-11-22: 1 row 0.35x, 8 rows 0.66x.
INT8_MAX_ROWS = 16
# torch._weight_int8pack_mm reads beyond rows of other widths, 8 numbers at a time with AVX2 and 16
# with AVX-512: wrong numbers or a crash, torch 2.13. 32 leaves room for the next CPU.
_INT8_WIDTH_STEP = 32


def new_weight(*shape: int, std: float) -> nn.Parameter:
    """Gaussian weights, or uninitialised ones on the meta device (where nothing can be drawn)."""
    weight = torch.empty(*shape)
    return nn.Parameter(weight if weight.is_meta else weight.normal_(std=std))


class Linear(nn.Module):
    """y = x W^T without bias; W may be fp32 master weights under bf16 activations."""

    def __init__(self, in_features: int, out_features: int, *, zero_init: bool = False) -> None:
        super().__init__()
        std = 0.0 if zero_init else in_features**-0.5
        self.weight = new_weight(out_features, in_features, std=std)
        # codes [out, in, zeros up to a multiple of 32], scale [out] bf16
        self.int8: tuple[Tensor, Tensor] | None = None

    def pack_int8(self) -> None:
        """Add an 8-bit copy for steps of a few tokens on a CPU, and round the weight to it.

        W ~= codes * scale, one scale per output row. The copy is read with bf16 activations.
        """
        weight = self.weight.data.float()
        # The kernel takes the scale in bf16: rounded first, so that both copies are one matrix.
        scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127.0).bfloat16()
        codes = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.weight.data = (codes * scale.float()[:, None]).to(self.weight.dtype)
        codes = F.pad(codes.to(torch.int8), (0, -codes.shape[1] % _INT8_WIDTH_STEP))
        self.int8 = codes, scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if self.int8 is not None and _is_few_rows(x):
            return _int8_product(x, *self.int8)
        return F.linear(x, self.weight.type_as(x))


class JointLinear:
    """Linear maps of one input: one product where they are packed. Their modules own the weights.

    No module itself, so that no weight has two names, and given its maps with each call, so that
    one that was replaced counts. joins_training: one product also where gradients are recorded;
    for narrow maps, whose input and its gradient would move once for each.
    """

    def __init__(self, *, joins_training: bool = False) -> None:
        self.joins_training = joins_training
        self.widths: list[int] = []
        self.int8: tuple[Tensor, Tensor] | None = None

    def pack_int8(self, *maps: Linear) -> None:
        """Lay the packed copies of the maps behind each other; these become parts of it."""
        self.widths = [m.weight.shape[0] for m in maps]
        codes, scale = (torch.cat(parts) for parts in zip(*(m.int8 for m in maps), strict=True))
        pieces = zip(codes.split(self.widths), scale.split(self.widths), strict=True)
        for linear, piece in zip(maps, pieces, strict=True):
            linear.int8 = piece
        self.int8 = codes, scale

    def __call__(self, x: Tensor, *maps: Linear) -> Sequence[Tensor]:
        """[..., in_features] to [..., out_features] of each map."""
        if self.int8 is not None and _is_few_rows(x):
            return _int8_product(x, *self.int8).split_with_sizes(self.widths, dim=-1)
        if self.joins_training and torch.is_grad_enabled() and x.requires_grad:
            return _joint_product(x, [m.weight for m in maps])
        return [m(x) for m in maps]


def _joint_product(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    widths = [len(weight) for weight in weights]
    # 16 bytes of 16-bit numbers: a GPU is slow at products of other widths.
    padding = -sum(widths) % 8
    joined = F.pad(torch.cat(list(weights)).type_as(x), (0, 0, 0, padding))
    return F.linear(x, joined).split_with_sizes([*widths, padding], dim=-1)[: len(widths)]


def _is_few_rows(x: Tensor) -> bool:
    shape = x.shape
    return len(shape) == 2 and shape[0] <= INT8_MAX_ROWS


def _int8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    x_bf16 = x.bfloat16()
    if codes.shape[1] != x.shape[1]:
        x_bf16 = F.pad(x_bf16, (0, codes.shape[1] - x.shape[1]))
    return torch._weight_int8pack_mm(x_bf16, codes, scale).type_as(x)


class Embedding(nn.Module):
    """One vector per token id; the weight may also serve as output head."""

    def __init__(self, num_embeddings: int, dim: int, *, std: float) -> None:
        super().__init__()
        self.weight = new_weight(num_embeddings, dim, std=std)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] int64 to [..., dim]."""
        return F.embedding(token_ids, self.weight)


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised x + residual, and that sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)
