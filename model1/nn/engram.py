"""Engram conditional memory of one layer: hashed rows, gate per residual stream.

Rows depend on token ids alone, so `rows` can be computed (and prefetched) before the layer runs.
Source: arXiv 2601.07372; one joint key/value projection as in DeepSeek-V4.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.layers import Linear, new_weight
from model1.ops.engram import HashSpec, RowStore, engram_gate, engram_hash

if TYPE_CHECKING:
    from model1.nn.context import Context

CONV_TAPS = 4  # arXiv 2601.07372; the dilation is the n-gram order
ROW_INIT_STD = 0.02


class EngramTable(nn.Module):
    """One flat table [num_rows, head_dim]: a trainable weight, or stored rows for inference."""

    def __init__(self, num_rows: int, head_dim: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = new_weight(num_rows, head_dim, std=ROW_INIT_STD)
        self.store: RowStore | None = None
        # True for an optimiser that takes a gradient of the rows that were read, each as often as
        # it was (`model1.train.optim`), in place of one of the table's size.
        self.has_sparse_gradient = False

    def set_rows(self, store: RowStore) -> None:
        """Read stored rows from now on; the trainable weight is dropped."""
        if self.weight is not None and (store.num_rows, store.dim) != tuple(self.weight.shape):
            raise ValueError(
                f"rows must be {list(self.weight.shape)}, got {[store.num_rows, store.dim]}"
            )
        self.weight, self.store = None, store

    def forward(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """rows [t, num_tables] int64 to their channels side by side, [t, num_tables * dim]."""
        if self.store is not None:
            if dtype == torch.float64:
                return self.store.gather(rows).flatten(1).to(dtype)
            return self.store.gather(rows, dtype=dtype).flatten(1)
        assert self.weight is not None
        read = F.embedding(rows, self.weight, sparse=self.has_sparse_gradient)
        return read.flatten(1).to(dtype)


class Engram(nn.Module):
    """x [t, n, c] + gate * value, with an optional short convolution of the gated value."""

    multipliers: Tensor
    table_sizes: Tensor
    table_offsets: Tensor

    def __init__(self, config: ModelConfig, layer_id: int, spec: HashSpec) -> None:
        super().__init__()
        engram = config.engram
        assert engram is not None
        self.layer_id, self.eps = layer_id, config.rms_norm_eps
        self.pad_token_id, self.dilation = engram.engram_pad_token_id, engram.engram_max_ngram_size
        c, n = config.hidden_size, config.num_streams
        self.num_streams = n
        self.table = EngramTable(spec.num_rows, engram.engram_head_dim)
        self.wkv = Linear(engram.embed_dim, c * (n + 1))
        self.norm_weight = nn.Parameter(torch.ones(n, c))
        self.conv_weight = (
            nn.Parameter(torch.zeros(n * c, CONV_TAPS)) if engram.short_conv else None
        )
        self.conv_norm = nn.Parameter(torch.ones(n, c)) if engram.short_conv else None
        for name in ("multipliers", "table_sizes", "table_offsets"):
            values = torch.from_numpy(np.asarray(getattr(spec, name)))
            self.register_buffer(name, values, persistent=False)

    def rows(self, ngram_token_ids: Tensor, compression_table: Tensor) -> Tensor:
        """Table rows of each token, [t, num_tables], from raw ids [t, N]; -1 = before the start."""
        return engram_hash(
            ngram_token_ids, compression_table, self.multipliers, self.table_sizes,
            self.table_offsets, pad_token_id=self.pad_token_id,
        )  # fmt: skip

    def forward(self, x: Tensor, rows: Tensor, context: Context) -> Tensor:
        """Streams x [t, n, c] to x plus the memory's contribution."""
        keys_value = self.wkv(self.table(rows, x.dtype)).unflatten(-1, (self.num_streams + 1, -1))
        key, value = keys_value[:, :-1], keys_value[:, -1]
        gated, _ = engram_gate(x, key, value, self.norm_weight, eps=self.eps)
        if self.conv_weight is None or self.conv_norm is None:
            return x + gated
        conv = context.short_conv(
            self.layer_id, gated.flatten(1), self.conv_weight, self.conv_norm, self.dilation,
            self.eps,
        )  # fmt: skip
        return x + gated + conv.view_as(x)


def ngram_windows(input_ids: Tensor, positions: Tensor, size: int) -> Tensor:
    """[t, size] raw ids: column i is the token i places earlier, -1 before the document's start.

    input_ids, positions: [t] of packed documents; positions restart at 0 in each.
    """
    columns = [input_ids]
    for i in range(1, size):
        shifted = F.pad(input_ids[:-i], (i, 0), value=-1) if i < len(input_ids) else None
        if shifted is None:
            shifted = torch.full_like(input_ids, -1)
        columns.append(torch.where(positions >= i, shifted, -1))
    return torch.stack(columns, dim=1)
