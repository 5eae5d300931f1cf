"""What the tests of Engram's kernels share."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from model1.config import EngramConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Base, orders and layers of the released 4-gram checkpoint.
LARGE = EngramConfig(
    engram_layer_ids=(1, 14),
    engram_max_ngram_size=4,
    engram_n_heads=8,
    engram_head_dim=256,
    engram_vocab_size=16_000_000,
    engram_compressed_vocab_size=99_092,
    engram_pad_token_id=2,
    engram_seed=0,
    short_conv=False,
)


def far(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same numbers with these strides, in memory of which nothing else is touched."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    if DEVICE == "cpu":
        flat = torch.frombuffer(mmap.mmap(-1, size * x.element_size()), dtype=x.dtype)
    else:
        flat = torch.zeros(size, dtype=x.dtype, device=DEVICE)
    return flat.as_strided(x.shape, strides).copy_(x)
