from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model1.ops.cross_entropy import has_kernel
from model1.train.config import LossSection
from model1.train.data import Batch
from model1.train.loss import (
    IGNORE,
    TargetCounts,
    chunked_cross_entropy,
    count_targets,
    mtp_targets,
    training_loss,
)


class Toy(nn.Module):
    """Embeds, and reports one scalar and states for the token after the next."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.ahead = nn.Linear(6, 6)

    @property
    def output_weight(self) -> Tensor:
        return self.embed.weight

    def forward_hidden(
        self, input_ids: Tensor, *, doc_starts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.embed(input_ids)
        return x, {"balance": x.square().mean(), "mtp_hidden": self.ahead(x)}


def make_batch(rows: int = 4, length: int = 9) -> Batch:
    ids = torch.randint(0, 11, (rows, length + 1))
    targets = ids[:, 1:].clone()
    targets[torch.rand(rows, length) < 0.3] = IGNORE
    return Batch(ids[:, :-1], targets, torch.zeros(rows, length, dtype=torch.int64))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
def test_chunks_give_the_loss_and_gradients_of_the_whole(chunk_tokens: int) -> None:
    hidden = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (13,))
    targets[::4] = IGNORE
    whole = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(whole, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets, chunk_tokens)
    torch.testing.assert_close(loss.double(), whole, rtol=1e-6, atol=0)
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up_to_the_step() -> None:
    model, batch, settings = Toy(), make_batch(), LossSection(chunk_tokens=7)
    training_loss(model, batch, settings)["loss"].backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    counts, total = count_targets(batch), 0.0
    for first in (0, 1):
        part = Batch(*(t[3 * first : 3 * first + 3 - 2 * first] for t in batch))
        share = len(part.input_ids) / 4
        terms = training_loss(model, part, settings, counts=counts, share=share)
        terms["loss"].backward()
        total += float(terms["loss"].detach())
    with torch.no_grad():
        expected = training_loss(model, batch, settings)["loss"]
    assert total == pytest.approx(float(expected), rel=1e-5)
    for parameter, grad in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


def test_terms_are_named_and_weighted() -> None:
    model, batch = Toy(), make_batch()
    terms = training_loss(model, batch, LossSection(mtp_weight=0.5, aux_weight=2.0))
    assert set(terms) == {"loss", "cross_entropy", "mtp", "balance"}
    expected = terms["cross_entropy"] + 0.5 * terms["mtp"] + 2.0 * terms["balance"]
    torch.testing.assert_close(terms["loss"], expected)
    assert "mtp" not in training_loss(model, batch, LossSection(mtp_weight=0.0))
    terms = training_loss(model, batch, LossSection(aux_weight=0.0))
    torch.testing.assert_close(terms["loss"], terms["cross_entropy"] + 0.3 * terms["mtp"])


def test_the_token_after_next_stays_in_the_document() -> None:
    targets = torch.tensor([[5, IGNORE, 7, 8, 9]])
    assert mtp_targets(targets).tolist() == [[IGNORE, IGNORE, 8, 9]]
    batch = Batch(targets, targets, targets)
    assert count_targets(batch) == TargetCounts(tokens=4, mtp=2)


def test_a_batch_without_targets_has_loss_zero() -> None:
    batch = make_batch()
    batch.targets.fill_(IGNORE)
    loss = training_loss(Toy(), batch, LossSection(aux_weight=0.0))["loss"]
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize("is_bf16", [False, True])
def test_the_operator_gives_what_checkpointed_chunks_give(
    is_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs, here on the operator's reference: also under autocast, with fp32 weights."""
    hidden = torch.randn(13, 6, requires_grad=True)
    weight = torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(0, 11, (13,))
    targets[::4] = IGNORE

    def results() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            loss = chunked_cross_entropy(hidden, weight, targets, 5) / 10
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    want = results()
    monkeypatch.setattr("model1.train.loss.has_kernel", lambda hidden: True)
    got = results()
    tolerance = 2e-2 if is_bf16 else 1e-5
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.gpu
def test_a_gpu_runs_the_kernel() -> None:
    hidden = torch.randn(37, 64, device="cuda", requires_grad=True)
    weight = torch.randn(501, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 501, (37,), device="cuda")
    targets[::4] = IGNORE
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, 16)
        whole = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    assert has_kernel(hidden)
    torch.testing.assert_close(loss, whole, rtol=1e-4, atol=0)
    want = torch.autograd.grad(whole, (hidden, weight))
    for x, y in zip(torch.autograd.grad(loss, (hidden, weight)), want, strict=True):
        assert float((x - y).norm() / y.norm()) < 0.01
