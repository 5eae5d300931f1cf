"""Fit the low-rank selectors of a trained model: PCA of its latents, then the selector's losses.

The backbone is frozen. Source of the recipe: DeepSeek-V3.2's dense warm-up of its indexer, with a
principal-component start because key and value are one latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from model1.errors import ConfigError
from model1.nn.block import Block
from model1.nn.indexer import LowRankSelector
from model1.nn.model import Model
from model1.train.data import Batch

Say = Callable[[str], None]


class _LatentStatistics:
    """Running first and second moments of every layer's unrotated latent channels."""

    def __init__(self, d_nope: int) -> None:
        self.d_nope = d_nope
        self.moments: dict[int, tuple[Tensor, Tensor, int]] = {}

    def add(self, layer_id: int, kv: Tensor) -> None:
        c = kv[:, : self.d_nope].detach().double()
        total, outer, count = self.moments.get(layer_id, (0.0, 0.0, 0))
        self.moments[layer_id] = (total + c.sum(0), outer + c.T @ c, count + len(c))

    def principal(self, layer_id: int, rank: int) -> tuple[Tensor, Tensor]:
        """Basis [rank, d_nope] of the largest variances, and the mean."""
        total, outer, count = self.moments[layer_id]
        mean = total / count
        covariance = outer / count - torch.outer(mean, mean)
        vectors = torch.linalg.eigh(covariance).eigenvectors
        return vectors[:, -rank:].T.flip(0).float(), mean.float()


@torch.no_grad()
def fit_principal(model: Model, batches: list[Batch]) -> None:
    """Set every selector's basis and mean from the latents of the given batches, in place."""
    sparse = model.config.sparse
    if sparse is None:
        raise ConfigError("the model has no sparse attention, so there is no selector to fit")
    statistics = _LatentStatistics(model.config.attention.latent_nope_dim)
    model.latent_hook = statistics.add
    try:
        for batch in batches:
            model.forward_hidden(batch.input_ids, doc_starts=batch.doc_starts)
    finally:
        model.latent_hook = None
    for layer_id, layer in enumerate(model.layers):
        selector = cast(Block, layer).attn.selector
        assert selector is not None
        basis, mean = statistics.principal(layer_id, sparse.index_rank)
        selector.basis.copy_(basis)
        selector.mean.copy_(mean)


def fit_selector(
    model: Model,
    batches: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    rows: int,
    calibration_batches: int = 4,
    say: Say = print,
) -> list[float]:
    """Principal components, then `steps` Adam steps on the selectors alone; the losses by step.

    The model must be on the batches' device; its other weights keep every bit. Rows longer than
    dense_below are needed: shorter ones give a loss of 0.
    """
    was_dense, model.dense_attention = model.dense_attention, True
    fit_principal(model, [next(batches) for _ in range(calibration_batches)])
    selectors = [m for m in model.modules() if isinstance(m, LowRankSelector)]
    parameters = [p for s in selectors for p in (s.basis, s.mean)]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    model.selector_rows = rows
    losses: list[float] = []
    try:
        for step in range(steps):
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = lr * (1.0 - step / steps)
            with torch.no_grad():  # the losses switch gradients on for themselves
                _, aux = model.forward_hidden(batch.input_ids, doc_starts=batch.doc_starts)
            optimizer.zero_grad()
            aux["selector"].backward()
            optimizer.step()
            model.after_optimizer_step()
            losses.append(aux["selector"].item())
            if step % 10 == 0 or step == steps - 1:
                say(f"selector step {step}: loss {losses[-1]:.4f}")
    finally:
        model.selector_rows, model.dense_attention = 0, was_dense
    return losses
