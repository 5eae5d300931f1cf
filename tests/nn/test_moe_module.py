"""The expert layer: equal to a dense layer when experts agree, load counting, balance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracles import assert_near

from model1 import presets
from model1.config import ModelConfig
from model1.nn.moe import BALANCE_STEP, FeedForward, MixtureOfExperts
from tests.nn.helpers import build

EXPERTS, TOPK, WIDTH, SCALING = 4, 2, 48, 1.5


def config(**changes: float) -> ModelConfig:
    base = presets.tiny_v32()
    assert base.moe is not None
    return dataclasses.replace(base, moe=dataclasses.replace(base.moe, **changes))


def layer(**changes: float) -> MixtureOfExperts:
    made = MixtureOfExperts(config(**changes))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name != "balance_bias":
                parameter.normal_(std=0.2)
    return made.eval()


@pytest.mark.parametrize("topk", [1, 2, EXPERTS])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_identical_experts_are_one_dense_layer(topk: int, shared: int) -> None:
    moe = layer(num_experts_per_tok=topk, n_shared_experts=shared)
    dense = FeedForward(config(), WIDTH)
    with torch.no_grad():
        gate_up = torch.cat([dense.w1.weight, dense.w3.weight])
        dense.w2.weight.normal_(std=0.2)
        moe.gate_up.copy_(gate_up.expand_as(moe.gate_up))
        moe.down.copy_(dense.w2.weight.expand_as(moe.down))
        x = torch.randn(20, 64) * 3
        want = SCALING * dense(x)
        if moe.shared_experts is not None:
            assert moe.shared_experts.w1.weight.shape[0] == shared * WIDTH
            want = want + moe.shared_experts(x)
        assert_near(moe(x), want, 2e-5)


def test_a_token_gets_its_experts_by_hand() -> None:
    moe = layer(n_shared_experts=0)
    x = torch.randn(30, 64)
    with torch.no_grad():
        got = moe(x)
        g = torch.log1p(torch.exp(x @ moe.gate.weight.T)).sqrt()
        for i in range(30):
            order = g[i].argsort(descending=True)[:TOPK].tolist()
            total = sum(g[i, e] for e in order)
            want = torch.zeros(64)
            for e in order:
                gate, up = (moe.gate_up[e] @ x[i]).split(WIDTH)
                hidden = torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)
                want += SCALING * g[i, e] / total * (moe.down[e] @ hidden)
            assert_near(got[i], want, 2e-5)


def test_every_weight_learns_except_the_balance_bias() -> None:
    moe = layer()
    moe(torch.randn(50, 64)).square().sum().backward()
    for name, parameter in moe.named_parameters():
        if name == "balance_bias":
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert (parameter.grad.flatten(1).abs().sum(1) > 0).any()


# --- balance -----------------------------------------------------------------------------


def test_training_counts_every_choice() -> None:
    moe = layer().train()
    x = torch.randn(40, 64)
    moe(x)
    chosen = (torch.log1p(torch.exp(x @ moe.gate.weight.T))).sqrt().topk(TOPK).indices
    want = torch.stack([(chosen == e).sum() for e in range(EXPERTS)]).float()
    assert torch.equal(moe.load, want)
    assert moe.load.sum() == 40 * TOPK
    moe(x[:7])  # a second micro-batch of the same step
    assert moe.load.sum() == 47 * TOPK


def test_scoring_counts_nothing() -> None:
    moe = layer()
    moe(torch.randn(40, 64))
    assert moe.load.sum() == 0


def test_the_bias_moves_against_the_load_and_the_count_restarts() -> None:
    moe = layer()
    moe.load.copy_(torch.tensor([10.0, 0.0, 5.0, 5.0]))
    moe.update_balance()
    assert_near(moe.balance_bias, torch.tensor([-1.0, 1.0, 0.0, 0.0]) * BALANCE_STEP, 1e-9)
    assert moe.load.sum() == 0
    moe.update_balance()  # no tokens: nothing to correct
    assert_near(moe.balance_bias, torch.tensor([-1.0, 1.0, 0.0, 0.0]) * BALANCE_STEP, 1e-9)


def test_repeated_updates_even_out_the_load() -> None:
    moe = layer(n_shared_experts=0).train()
    x = torch.randn(200, 64) + 0.5
    with torch.no_grad():
        moe.gate.weight.mul_(0.2)
        moe.gate.weight[0] += 0.02  # an expert that most tokens want

    def spread() -> float:
        moe.load.zero_()
        moe(x)
        share = moe.load / moe.load.sum()
        return float((share - 1 / EXPERTS).abs().max())

    before = spread()
    for _ in range(400):
        spread()
        moe.update_balance()
    assert before > 0.15
    assert spread() < 0.05


def test_the_model_updates_every_expert_layer_after_a_step() -> None:
    model = build(presets.tiny_v32()).train()
    ids = torch.randint(0, 256, (2, 40))
    model.forward_hidden(ids)
    layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    assert len(layers) == 3  # two of the stack, one of the second head
    want = [m.balance_bias + BALANCE_STEP * torch.sign(m.load.mean() - m.load) for m in layers]
    assert all(m.load.sum() == 2 * 40 * TOPK for m in layers)
    model.after_optimizer_step()
    for module, bias in zip(layers, want, strict=True):
        assert torch.equal(module.balance_bias, bias)


def test_measuring_in_training_does_not_count_as_load() -> None:
    model = build(presets.tiny_v32()).train()
    model.diagnostics(torch.randint(0, 256, (1, 40)))
    assert all(m.load.sum() == 0 for m in model.modules() if isinstance(m, MixtureOfExperts))


def test_the_first_layers_stay_dense() -> None:
    model = build(presets.tiny_v32())
    kinds = [type(block.ffn) for block in model.layers]
    assert kinds == [FeedForward, MixtureOfExperts, MixtureOfExperts]


def test_the_clamp_of_swiglu_bounds_routed_and_shared_experts() -> None:
    moe = layer()
    assert moe.shared_experts is not None
    with torch.no_grad():
        for parameter in (moe.down, moe.shared_experts.w2.weight):
            parameter.fill_(1.0)
    x = torch.randn(6, 64) * 1e3
    largest = 10 * 10 * WIDTH  # every hidden value is at most silu(10) * 10
    assert moe(x).abs().max() <= largest * (SCALING + 1)
    moe.limit = moe.shared_experts.limit = None
    assert moe(x).abs().max() > 10 * largest
