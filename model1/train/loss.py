"""Training losses. Logits exist for a few thousand tokens at a time, never for a whole batch.

The model gives hidden states and its output matrix; everything about targets lives here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model1.errors import ConfigError
from model1.ops.cross_entropy import has_kernel, linear_cross_entropy
from model1.ops.cross_entropy.checks import IGNORE
from model1.train.config import LossSection
from model1.train.data import Batch

ChunkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
MTP_HIDDEN = "mtp_hidden"
MTP_WEIGHT = 0.3  # of the multi-token prediction loss, DeepSeek-V3 (arXiv 2412.19437)


class Trainable(Protocol):
    """What the trainer asks of a model."""

    @property
    def output_weight(self) -> Tensor:
        """Output matrix [vocab, c]; logits are hidden @ output_weight.T."""
        ...

    def forward_hidden(
        self, input_ids: Tensor, *, doc_starts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised hidden states [b, s, c] and extra terms: scalars to add to the loss, and
        under "mtp_hidden" the states [b, s, c] that predict the token after the next."""
        ...


class TargetCounts(NamedTuple):
    """Targets of one optimiser step, counted before its micro-batches run."""

    tokens: int
    mtp: int


def check_loss(settings: LossSection, model: nn.Module) -> None:
    """Raise ConfigError for a weight of a term that this model does not have."""
    if settings.mtp_weight and getattr(model, "mtp", None) is None:
        raise ConfigError(
            f"loss.mtp_weight needs a model with an MTP head, got {settings.mtp_weight} without one"
        )


def count_targets(batch: Batch) -> TargetCounts:
    """Targets for the next token, and for the token after it within the same document."""
    learn = batch.targets != IGNORE
    return TargetCounts(int(learn.sum()), int((learn[:, 1:] & learn[:, :-1]).sum()))


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """sum_i -log softmax(logits_i)[targets_i] in fp32 over logits [n, vocab]; -100 adds 0."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


def chunk_loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy_sum` of hidden [n, c] @ weight[vocab, c].T."""
    return cross_entropy_sum(hidden @ weight.T, targets)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    chunk_loss: ChunkLoss = chunk_loss_sum,
) -> Tensor:
    """Summed cross-entropy of hidden [n, c] against weight [vocab, c] and targets [n] int64.

    Peak memory is chunk_tokens * vocab whatever n is. Softmax in fp32. Returns an fp32 scalar.
    `linear_cross_entropy` where its kernel or a plug-in runs: it is compiled as it is. Elsewhere
    `chunk_loss` makes the logits of each chunk, and makes them again in the backward pass.
    """
    if has_kernel(hidden):
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        return linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk_tokens)
    total = hidden.new_zeros((), dtype=torch.float32)
    chunks = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    for part, wanted in chunks:
        if torch.is_grad_enabled():
            loss = checkpoint(
                chunk_loss, part, weight, wanted,
                use_reentrant=False, preserve_rng_state=False,  # nothing is drawn
            )  # fmt: skip
            total = total + cast(Tensor, loss)
        else:
            total = total + chunk_loss(part, weight, wanted)
    return total


def training_loss(
    model: Trainable,
    batch: Batch,
    settings: LossSection,
    *,
    counts: TargetCounts | None = None,
    share: float = 1.0,
    chunk_loss: ChunkLoss = chunk_loss_sum,
) -> dict[str, Tensor]:
    """Loss terms of one micro-batch as fp32 scalars; "loss" is what to differentiate.

    loss = cross_entropy + mtp_weight * mtp + aux_weight * sum(aux)

    Terms of the micro-batches of one optimiser step add up to the step's own: entropies are
    divided by the step's targets `counts` (None: the batch is the whole step), and terms that the
    model reports, already means over the micro-batch, are multiplied by its `share` of the rows.
    """
    counts = counts or count_targets(batch)
    hidden, aux = model.forward_hidden(batch.input_ids, doc_starts=batch.doc_starts)
    weight, chunk = model.output_weight, settings.chunk_tokens

    def mean(states: Tensor, targets: Tensor, count: int) -> Tensor:
        flat = states.flatten(0, 1), weight, targets.flatten()
        return chunked_cross_entropy(*flat, chunk, chunk_loss) / max(count, 1)

    terms = {"cross_entropy": mean(hidden, batch.targets, counts.tokens)}
    loss = terms["cross_entropy"]
    aux = dict(aux)
    ahead = aux.pop(MTP_HIDDEN, None)
    mtp_weight = MTP_WEIGHT if settings.mtp_weight is None else settings.mtp_weight
    if ahead is not None and mtp_weight:
        terms["mtp"] = mean(ahead[:, :-1], mtp_targets(batch.targets), counts.mtp)
        loss = loss + mtp_weight * terms["mtp"]
    for name, value in aux.items():
        terms[name] = value.float() * share
        loss = loss + settings.aux_weight * terms[name]
    return {"loss": loss, **terms}


def mtp_targets(targets: Tensor) -> Tensor:
    """[b, s - 1]: token after next of column i, -100 where either next token is not a target."""
    return torch.where(targets[:, :-1] != IGNORE, targets[:, 1:], IGNORE)
