"""Hyper-connections in the model: start, orientation of the mixing, diagnostics."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracles import assert_near
from torch import Tensor

from model1 import presets
from model1.config import ModelConfig
from model1.nn.mhc import HyperConnection, HyperHead, sinkhorn_error
from model1.nn.model import Model
from model1.ops.mhc import MhcCoefficients, mhc_collapse
from tests.nn.helpers import build

C = 64


def without_engram() -> ModelConfig:
    return dataclasses.replace(presets.tiny(), engram=None)


def tokens(rows: int = 2, length: int = 60) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))


def with_streams(base: Model) -> Model:
    """The same weights with hyper-connections at their start around every sublayer."""
    model = Model(dataclasses.replace(base.config, mhc=presets.tiny().mhc)).eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert unexpected == []
    assert all("mhc" in name for name in missing)
    return model


def test_identical_streams_act_as_the_plain_residual_at_the_start() -> None:
    """pre sums to n / 2, which the next norm removes; post is 1; columns of comb sum to 1."""
    base = build(dataclasses.replace(without_engram(), mhc=None))
    model = with_streams(base)
    ids = tokens()
    with torch.inference_mode():
        want = base(ids)
        near = model(ids)
        for name, parameter in model.named_parameters():
            if "mhc" in name and name.endswith("scale"):
                parameter.zero_()  # without the small input-dependent part the match is exact
        exact = model(ids)
    assert_near(exact, want, 2e-4)
    assert (near - want).abs().max() <= 0.1 * want.abs().max()
    assert (near - want).norm() <= 0.02 * want.norm()


def test_one_sublayer_at_the_start_by_hand() -> None:
    connection = HyperConnection(presets.tiny())
    with torch.no_grad():
        connection.scale.zero_()
    x, y = torch.randn(5, 1, C).expand(5, 4, C), torch.randn(5, C)
    weights = connection.coefficients(x)
    assert_near(mhc_collapse(x, weights.pre), 2.0 * x[:, 0], 2e-5)
    after = connection.write_back(x, y, weights)
    for stream in range(4):
        assert_near(after[:, stream], x[:, 0] + y, 2e-5)


def test_the_input_dependent_part_starts_small_and_not_at_zero() -> None:
    connection = HyperConnection(presets.tiny())
    x = torch.randn(100, 4, C)
    moved = connection.coefficients(x)
    with torch.no_grad():
        connection.scale.zero_()
    still = connection.coefficients(x)
    for a, b in zip(moved, still, strict=True):
        assert 1e-5 < (a - b).abs().max() < 0.05


def test_streams_mix_in_the_stated_direction() -> None:
    """base is row-major: its entry (j, k) makes stream j flow into stream k."""
    connection = HyperConnection(presets.tiny())
    n = 4
    cycle = torch.zeros(n, n)  # stream j goes to stream j + 1: doubly stochastic, not symmetric
    for j in range(n):
        cycle[j, (j + 1) % n] = 40.0
    with torch.no_grad():
        connection.scale.zero_()
        connection.base[2 * n :] = cycle.flatten()
    x = torch.randn(3, n, C)
    weights = connection.coefficients(x)
    after = connection.write_back(x, torch.zeros(3, C), weights)
    assert_near(after, x.roll(1, dims=1), 1e-4)


def test_each_group_of_coefficients_has_its_own_gate() -> None:
    connection = HyperConnection(presets.tiny())
    x = torch.randn(5, 4, C)
    with torch.no_grad():
        connection.scale.zero_()
        still = connection.coefficients(x)
        for i, name in enumerate(MhcCoefficients._fields):
            connection.scale.copy_(torch.eye(3)[i])
            got = connection.coefficients(x)
            for field in MhcCoefficients._fields:
                same = torch.equal(getattr(got, field), getattr(still, field))
                assert same == (field != name)


def test_every_parameter_of_a_connection_learns() -> None:
    model = build(without_engram())
    model(tokens()).square().mean().backward()
    for module in model.modules():
        if isinstance(module, HyperConnection | HyperHead):
            for parameter in module.parameters():
                assert parameter.grad is not None
                assert parameter.grad.abs().max() > 0


def test_the_exit_weighs_streams_by_its_own_sigmoid() -> None:
    head = HyperHead(presets.tiny())
    with torch.no_grad():
        head.scale.zero_()
        head.base.copy_(torch.tensor([20.0, -20.0, 0.0, -20.0]))
    x = torch.randn(3, 4, C)
    assert_near(mhc_collapse(x, head.weights(x)), x[:, 0] + 0.5 * x[:, 2], 2e-5)


# --- diagnostics -------------------------------------------------------------------------


def test_sinkhorn_error_is_the_worst_row_or_column() -> None:
    comb = torch.eye(3).repeat(4, 1, 1)
    zero = torch.zeros(4, 3)
    assert sinkhorn_error(MhcCoefficients(zero, zero, comb)) == 0
    comb[2, 0, 1] = 0.25  # row 0 and column 1 of one token
    assert sinkhorn_error(MhcCoefficients(zero, zero, comb)) == 0.25
    comb[3, 1, 1] = 0.5
    assert sinkhorn_error(MhcCoefficients(zero, zero, comb)) == 0.5


def test_diagnostics_report_the_worst_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(without_engram())
    ids = tokens()
    start = model.diagnostics(ids)
    assert set(start) == {"sinkhorn_error"}
    assert start["sinkhorn_error"] < 2e-2
    with torch.no_grad():  # a triangular mixing converges to the identity like 1 / rounds
        model.layers[1].mhc_ffn.base[8:] = torch.full((4, 4), 12.0).triu().flatten()
    seen: list[float] = []

    def spy(weights: MhcCoefficients) -> Tensor:
        seen.append(float(sinkhorn_error(weights)))
        return sinkhorn_error(weights)

    monkeypatch.setattr("model1.nn.mhc.sinkhorn_error", spy)
    got = model.diagnostics(ids)["sinkhorn_error"]
    assert len(seen) == 2 * 3
    assert got == max(seen)
    assert got > 2 * start["sinkhorn_error"]


def test_diagnostics_leave_the_model_as_it_was() -> None:
    model = build(without_engram())
    ids = tokens()
    want = model(ids)
    model.diagnostics(ids)
    assert all(m.worst_error is None for m in model.modules() if isinstance(m, HyperConnection))
    assert torch.equal(model(ids), want)
    assert build(dataclasses.replace(without_engram(), mhc=None)).diagnostics(ids) == {}


def test_the_error_of_the_shipped_rounds_is_known() -> None:
    """Mixing near the identity converges slowly: 8 rounds leave 1e-3, later some percent."""
    config = presets.code_small(compressed_vocab_size=8192)
    connection = HyperConnection(config)
    x = torch.randn(500, 4, config.hidden_size)
    assert sinkhorn_error(connection.coefficients(x)) < 2e-3
    with torch.no_grad():
        connection.base[8:] += torch.randn(16) * 0.5
    assert sinkhorn_error(connection.coefficients(x)) < 0.1
