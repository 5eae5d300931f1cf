"""Value-vector position awareness: each part neutral at the start, learnable, and as stated."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracles import assert_near, double_precision
from torch import Tensor

from model1 import presets
from model1.config import ModelConfig, VvpaConfig, YarnConfig
from model1.nn.attention import Attention
from model1.nn.context import FullContext, frequencies
from model1.nn.model import Model
from model1.nn.vvpa import LogTemperature, OutputGate
from model1.ops.rope import rotation
from tests.nn.helpers import build

LENGTH = 80  # beyond the reference length 32 of `tiny`
OFF = VvpaConfig(
    rotary_value=False, output_gate=False, log_temperature=False, yarn=None, reference_length=32
)
YARN_1 = YarnConfig(factor=1.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0)


def plain(vvpa: VvpaConfig, form: str = "model1") -> ModelConfig:
    config = presets.tiny() if form == "model1" else presets.tiny_v32()
    return dataclasses.replace(config, engram=None, moe=None, vvpa=vvpa)


def tokens() -> Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def context(config: ModelConfig, length: int, dtype: torch.dtype = torch.float32) -> FullContext:
    return FullContext(config, torch.zeros(1, length, dtype=torch.int64), dtype, dense=True)


# --- neutral at the start ----------------------------------------------------------------


@pytest.mark.parametrize("form", ["model1", "v32"])
@pytest.mark.parametrize(
    ("part", "limit"),
    [({"output_gate": True}, 0.0), ({"log_temperature": True}, 0.0), ({"yarn": YARN_1}, 1e-5)],
)
def test_switching_a_part_on_changes_nothing_at_first(
    form: str, part: dict[str, object], limit: float
) -> None:
    base = build(plain(OFF, form))  # every shared weight moved off its start: attention acts
    on = Model(plain(dataclasses.replace(OFF, **part), form)).eval()  # type: ignore[arg-type]
    missing, unexpected = on.load_state_dict(base.state_dict(), strict=False)
    assert unexpected == []
    assert all("gate.proj" in m or "position_slope" in m or "temperature" in m for m in missing)
    ids = tokens()
    with torch.inference_mode():
        assert_near(on(ids), base(ids), limit)
        for name, parameter in on.named_parameters():
            if name in missing:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        moved = (on(ids) - base(ids)).abs().max()
    assert (moved > 1e-3) == bool(missing)  # the part is in use


@pytest.mark.parametrize("form", ["model1", "v32"])
def test_gradient_reaches_every_new_parameter(form: str) -> None:
    vvpa = dataclasses.replace(OFF, output_gate=True, log_temperature=True)
    model = Model(plain(vvpa, form))
    for layer in model.layers:
        torch.nn.init.normal_(layer.attn.wo_b.weight)  # zero at the start, like every output
    model(tokens()).square().sum().backward()
    for layer in model.layers:
        attention = layer.attn
        for parameter in (
            attention.gate.proj.weight,
            attention.gate.position_slope,
            attention.temperature.slope,
        ):
            assert parameter.grad is not None
            assert (parameter.grad != 0).all()


# --- output gate and temperature ---------------------------------------------------------


def test_gate_and_temperature_are_the_formulas() -> None:
    config = presets.tiny()
    gate, temperature = OutputGate(config), LogTemperature(config)
    with torch.no_grad():
        for parameter in (*gate.parameters(), *temperature.parameters()):
            parameter.normal_()
    positions = torch.tensor([0, 5, 31, 32, 500])
    log_position = torch.log((positions + 1) / 32)
    x = torch.randn(5, 64)
    gates, factors = gate(gate.proj(x), log_position), temperature(log_position)
    for i, position in enumerate(positions.tolist()):
        logits = gate.proj.weight.double() @ x[i].double()
        for head in range(4):
            where = math.log((position + 1) / 32)
            logit = logits[head].item() + gate.position_slope[head].item() * where
            assert gates[i, head].item() == pytest.approx(2 / (1 + math.exp(-logit)), abs=1e-5)
            n = position + 1
            factor = 1 + temperature.slope[head].item() * math.log(max(n, 32) / 32)
            assert factors[i, head].item() == pytest.approx(factor, abs=1e-5)
    assert torch.equal(factors[:3], torch.ones(3, 4))  # exactly 1 up to the reference length


def test_the_temperature_multiplies_the_logits() -> None:
    config = plain(dataclasses.replace(OFF, log_temperature=True))
    attention, where = Attention(config), context(config, LENGTH)
    x = torch.randn(LENGTH, 64)
    with torch.no_grad():
        q, kv, _ = attention.project(0, x, where)
        assert attention.temperature is not None
        attention.temperature.slope.copy_(torch.tensor([0.0, 0.5, 1.0, -0.2]))
        hot, same_kv, _ = attention.project(0, x, where)
    factor = attention.temperature(where.log_position)
    assert torch.equal(kv, same_kv)
    logits, hot_logits = (torch.einsum("thd,sd->ths", v, kv) for v in (q, hot))
    assert_near(hot_logits, logits * factor[..., None], 1e-4)


# --- rotary value ------------------------------------------------------------------------


def attend_at(attention: Attention, config: ModelConfig, x: Tensor, shift: int) -> Tensor:
    """One attention sublayer on x with all positions moved by `shift`."""
    where = context(config, len(x), x.dtype)
    where.rotation = rotation(where.positions + shift, frequencies(config))
    q, kv, gate = attention.project(0, x, where)
    return attention.finish(where.attend(0, q, kv, attention.spec), gate, where)


def test_shifting_every_position_leaves_the_output_unchanged() -> None:
    config = dataclasses.replace(
        plain(dataclasses.replace(OFF, rotary_value=True)), mhc=None, sparse=None
    )
    attention = Attention(config).double()
    torch.nn.init.normal_(attention.wo_b.weight)
    x = torch.randn(30, 64, dtype=torch.float64)
    with double_precision(), torch.no_grad():
        want = attend_at(attention, config, x, 0)
        for shift in (1, 17, 4096):
            assert_near(attend_at(attention, config, x, shift), want, 1e-9)
        attention.rotary_value = False  # the same values, not turned back
        still = attend_at(attention, config, x, 0)
        assert (attend_at(attention, config, x, 17) - still).abs().max() > 1e-2


def test_moving_one_token_alone_changes_the_value_it_gives() -> None:
    """The rotary value does carry position: relative, and not nothing."""
    config = plain(dataclasses.replace(OFF, rotary_value=True))
    attention = Attention(config)
    where = context(config, 2)
    latent = attention.project(0, torch.randn(2, 64), where)[1]
    values = []
    for distance in (0, 3):  # attends to the first token only, from `distance` further on
        where.rotation = rotation(torch.tensor([0, 1 + distance]), frequencies(config))
        out = latent[:1].expand(2, -1)[:, None].expand(2, 4, -1)
        nope = config.attention.latent_nope_dim
        torch.nn.init.normal_(attention.wo_b.weight, generator=torch.Generator().manual_seed(0))
        values.append(attention.finish(out, None, where).detach())
        assert out[..., nope:].abs().max() > 0
    assert torch.equal(values[0][0], values[1][0])
    assert (values[0][1] - values[1][1]).abs().max() > 1e-2


def test_rotary_value_widens_the_value_by_the_rotary_channels() -> None:
    on, off = plain(dataclasses.replace(OFF, rotary_value=True)), plain(OFF)
    assert (on.value_dim, off.value_dim) == (96, 64)
    assert Attention(on).wo_a.shape[-1] == Attention(off).wo_a.shape[-1] + 2 * 32


# --- YaRN --------------------------------------------------------------------------------


def test_model_frequencies_follow_the_config() -> None:
    config = plain(OFF)
    base = frequencies(config)
    assert base.shape == (16,)
    assert_near(frequencies(plain(dataclasses.replace(OFF, yarn=YARN_1))), base, 1e-16)
    previous = base
    for factor in (2.0, 4.0, 16.0):
        yarn = dataclasses.replace(YARN_1, factor=factor)
        got = frequencies(plain(dataclasses.replace(OFF, yarn=yarn)))
        assert (got <= previous).all()
        assert (got >= base / factor * (1 - 1e-12)).all()
        assert got[-1] == pytest.approx(base[-1].item() / factor)
        previous = got
    assert previous[-1] < base[-1] / 8


def test_yarn_changes_logits_only_through_the_slow_pairs() -> None:
    fast = YarnConfig(
        factor=8.0, original_max_position_embeddings=10**9, beta_fast=32.0, beta_slow=1.0
    )
    base = build(plain(OFF))
    ids = tokens()
    with torch.inference_mode():
        want = base(ids)
        for yarn, same in ((fast, True), (dataclasses.replace(YARN_1, factor=8.0), False)):
            model = Model(plain(dataclasses.replace(OFF, yarn=yarn))).eval()
            model.load_state_dict(base.state_dict())
            difference = (model(ids) - want).abs().max()
            assert difference == 0 if same else difference > 1e-3


def test_v32_has_no_rotary_value() -> None:
    with pytest.raises(ValueError, match="rotary_value must be false when form is 'v32'"):
        plain(dataclasses.replace(OFF, rotary_value=True), "v32")
