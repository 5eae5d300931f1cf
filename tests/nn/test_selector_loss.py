"""Losses of the low-rank selector and its fitting: the backbone never moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near
from torch import Tensor

from model1 import presets
from model1.config import ModelConfig
from model1.errors import ConfigError
from model1.nn.attention import AttendSpec
from model1.nn.indexer import LowRankSelector
from model1.nn.layers import RmsNorm
from model1.nn.model import Model
from model1.nn.selector_loss import sample_rows, selector_loss
from model1.ops.dense_attention import dense_attention
from model1.train.data import Batch
from model1.train.selector import fit_principal, fit_selector
from tests.nn.helpers import build

LENGTH = 72


def with_rank(config: ModelConfig, rank: int) -> ModelConfig:
    assert config.sparse is not None
    return dataclasses.replace(config, sparse=dataclasses.replace(config.sparse, index_rank=rank))


def batches(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(0, 256, (rows, length), generator=generator)
        yield Batch(ids, ids, torch.zeros_like(ids))


def selectors(model: Model) -> list[LowRankSelector]:
    """One of each layer of the stack."""
    return [m for m in model.layers.modules() if isinstance(m, LowRankSelector)]


def is_selector(name: str) -> bool:
    return ".selector." in name


def backbone(model: Model) -> dict[str, Tensor]:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {k: v.detach().clone() for k, v in state.items() if not is_selector(k)}


def selector_error(model: Model, batch: Batch) -> Tensor:
    model.dense_attention, model.selector_rows = True, 16
    with torch.no_grad():  # of the backbone; the loss has its gradient all the same
        _, aux = model.forward_hidden(batch.input_ids, doc_starts=batch.doc_starts)
    model.dense_attention, model.selector_rows = False, 0
    return aux["selector"]


# --- the loss ----------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 200), min_size=0, max_size=80),
    dense_below=st.integers(0, 100),
    count=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_sampled_rows_are_distinct_sparse_ones_up_to_both_ends(
    lengths: list[int], dense_below: int, count: int
) -> None:
    eligible = [i for i, n in enumerate(lengths) if n > dense_below]
    got = sample_rows(torch.tensor(lengths, dtype=torch.int64), dense_below, count).tolist()
    assert got == sorted(set(got))
    assert set(got) <= set(eligible)
    assert len(got) == min(count, len(eligible))
    if count > 1 and eligible:
        assert (got[0], got[-1]) == (eligible[0], eligible[-1])


def test_the_loss_is_relative_error_plus_divergence_of_the_pooled_attention() -> None:
    config = presets.tiny()
    selector = LowRankSelector(config)
    sink = torch.randn(4)
    spec = AttendSpec(96, 0.3, sink, selector, RmsNorm(96, 1e-6))
    q, kv = torch.randn(LENGTH, 4, 96), torch.randn(LENGTH, 96)
    start, end = torch.zeros(LENGTH, dtype=torch.int64), torch.arange(1, LENGTH + 1)
    start[50:] = 3
    rows = torch.tensor([40, 55, 71])
    got = selector_loss(q, kv, start, end, spec, 64, rows)

    with torch.no_grad():
        z = selector.project(kv[:, :64])
        result = selector.attend(
            q[rows], z, kv, start[rows], end[rows],
            value_dim=96, softmax_scale=0.3, attn_sink=sink,
        )  # fmt: skip
        dense, _ = dense_attention(
            q[rows], kv, start[rows], end[rows], value_dim=96, softmax_scale=0.3, attn_sink=sink
        )
        want = 0.0
        for i, row in enumerate(rows.tolist()):
            a, b = int(start[row]), int(end[row])
            for head in range(4):
                difference = result.out[i, head] - dense[i, head]
                want += (difference.norm() / dense[i, head].norm()).item() ** 2 / (3 * 4)
            logits = q[row] @ kv[a:b].T * 0.3
            p = logits.softmax(-1).mean(0)
            scan = result.scores[i, :, a:b].softmax(-1).mean(0)
            want += (p * (p / scan).log()).sum().item() / 3
    assert got.item() == pytest.approx(want, rel=1e-4)


def test_the_loss_reaches_the_selector_alone() -> None:
    model = build(presets.tiny())
    model.dense_attention, model.selector_rows = True, 16
    model.forward_hidden(next(batches()).input_ids)[1]["selector"].backward()
    for name, parameter in model.named_parameters():
        if is_selector(name):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_loss_leaves_the_gradient_of_the_language_model_alone() -> None:
    model = build(presets.tiny())
    batch = next(batches())
    model.dense_attention = True

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        hidden, aux = model.forward_hidden(batch.input_ids)
        (hidden.square().mean() + sum(aux.values())).backward()
        named = model.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None and not is_selector(n)}

    want = gradients()
    model.selector_rows = 8
    got = gradients()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_rows_too_short_for_sparse_attention_cost_nothing() -> None:
    model = build(presets.tiny())
    loss = selector_error(model, next(batches(length=32)))
    assert loss.item() == 0
    loss.backward()  # and still belongs to the graph: a step may have nothing else to do
    parameters = [p for n, p in model.named_parameters() if is_selector(n)]
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in parameters)


# --- principal components ----------------------------------------------------------------


def test_principal_components_are_those_of_the_latents() -> None:
    model = build(presets.tiny())
    seen: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    data = [next(batches(seed=i)) for i in range(3)]
    with torch.no_grad():
        model.latent_hook = lambda layer, kv: seen[layer].append(kv[:, :64])
        for batch in data:
            model.forward_hidden(batch.input_ids)
        model.latent_hook = None
    fit_principal(model, data)
    assert model.latent_hook is None
    for i, selector in enumerate(selectors(model)):
        latents = torch.cat(seen[i]).double()
        assert_near(selector.mean, latents.mean(0), 1e-5)
        assert_near(selector.basis @ selector.basis.T, torch.eye(16), 1e-5)
        centred = latents - latents.mean(0)
        singular = torch.linalg.svdvals(centred)
        kept = (centred @ selector.basis.double().T).square().sum()
        assert kept.item() == pytest.approx(singular[:16].square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("form", ["model1", "v32"])
def test_at_full_rank_the_fitted_loss_is_zero(form: str) -> None:
    base = presets.tiny() if form == "model1" else presets.tiny_v32()
    model = build(with_rank(base, base.attention.latent_nope_dim))
    data = batches(rows=4)
    fit_principal(model, [next(data)])
    assert selector_error(model, next(data)).item() < 1e-5


def test_principal_components_beat_a_random_basis() -> None:
    model = build(presets.tiny())
    data = batches()
    held_out = next(batches(seed=9))
    before = selector_error(model, held_out).item()
    fit_principal(model, [next(data) for _ in range(3)])
    assert selector_error(model, held_out).item() < 0.8 * before


# --- fitting -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model1", "v32"])
@pytest.mark.parametrize("training", [False, True])
def test_fitting_lowers_the_loss_and_moves_no_bit_of_the_backbone(
    form: str, training: bool
) -> None:
    base = presets.tiny() if form == "model1" else presets.tiny_v32()
    model = build(with_rank(dataclasses.replace(base, num_hidden_layers=2), 8)).train(training)
    want, held_out = backbone(model), next(batches(rows=4, seed=9))
    fit_principal(model, [next(batches(seed=i)) for i in range(3)])
    start = selector_error(model, held_out).item()
    lines: list[str] = []
    losses = fit_selector(
        model, batches(rows=4), steps=12, lr=5e-3, rows=16, calibration_batches=3, say=lines.append
    )
    assert len(losses) == 12
    assert len(lines) == 3
    assert sum(losses[-3:]) < sum(losses[:3])
    assert selector_error(model, held_out).item() < start
    got = backbone(model)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    assert (model.selector_rows, model.dense_attention) == (0, False)
    for selector in selectors(model):
        assert_near(selector.basis @ selector.basis.T, torch.eye(8), 1e-5)


def test_fitting_makes_sparse_logits_closer_to_dense_ones() -> None:
    model = build(presets.tiny())
    ids = next(batches(rows=3, seed=9)).input_ids

    def distance() -> float:
        with torch.inference_mode():
            sparse = model(ids)
            model.dense_attention = True
            dense = model(ids)
            model.dense_attention = False
            return float((sparse - dense).norm() / dense.norm())

    before = distance()
    fit_selector(model, batches(rows=4), steps=8, lr=3e-3, rows=16, say=lambda _: None)
    assert distance() < 0.8 * before


def test_training_with_sparse_attention_on_keeps_the_bases_orthonormal() -> None:
    """The language-model loss reaches a basis through the remainder, and must not bend it."""
    model = build(presets.tiny()).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss = model(next(batches()).input_ids).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_optimizer_step()
    for selector in selectors(model):
        assert_near(selector.basis @ selector.basis.T, torch.eye(16), 1e-4)


def test_a_model_without_sparse_attention_has_nothing_to_fit() -> None:
    model = build(dataclasses.replace(presets.tiny(), sparse=None))
    with pytest.raises(ConfigError, match="no sparse attention"):
        fit_selector(model, batches(), steps=1, lr=1e-3, rows=4)
