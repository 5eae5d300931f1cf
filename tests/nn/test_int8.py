"""8-bit copies of the matrices for decode steps on a CPU."""

from __future__ import annotations

import pytest
import torch

from model1 import presets
from model1.config import ModelConfig
from model1.engine.config import EngineConfig, resolve_placement
from model1.errors import ConfigError
from model1.nn.layers import INT8_MAX_ROWS, JointLinear, Linear
from tests.nn.helpers import build, step_metadata


def packed_linear(rows: int, columns: int) -> tuple[Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = Linear(columns, rows)
    before = layer.weight.detach().clone()
    layer.pack_int8()
    return layer, before


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (224, 384), (1, 32)])
def test_rounded_weight_is_near_and_equals_the_codes(rows: int, columns: int) -> None:
    layer, before = packed_linear(rows, columns)
    assert layer.int8 is not None
    codes, scale = layer.int8
    after = layer.weight.detach()
    assert torch.equal(after, codes.float() * scale.float()[:, None])
    step = scale.float()
    assert ((after - before).abs().amax(1) <= 0.51 * step + 1e-12).all()


def test_few_rows_and_many_rows_use_one_matrix() -> None:
    layer, _ = packed_linear(224, 384)
    x = torch.randn(INT8_MAX_ROWS + 1, 384)
    with torch.inference_mode():
        many = layer(x)
        few = torch.cat([layer(x[:INT8_MAX_ROWS]), layer(x[-1:])])
    exact = x.double() @ layer.weight.double().T
    reference = (x.bfloat16() @ layer.weight.bfloat16().T).double()
    allowed = 2 * (reference - exact).norm(dim=1) + 1e-6
    assert ((few - exact).norm(dim=1) <= allowed).all()
    assert ((many - exact).norm(dim=1) <= 1e-4).all()


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("columns", [4, 8, 20, 40, 100])
def test_any_width_is_read_to_its_end_and_no_further(columns: int, num_tokens: int) -> None:
    layer, _ = packed_linear(24, columns)
    inside = torch.full((num_tokens + 2, columns), torch.nan)  # whatever lies around x
    x = inside[1:-1].normal_()
    with torch.inference_mode():
        got = layer(x)
    exact = x.double() @ layer.weight.double().T
    reference = (x.bfloat16() @ layer.weight.bfloat16().T).double()
    assert ((got - exact).norm(dim=1) <= 2 * (reference - exact).norm(dim=1) + 1e-6).all()


def test_a_replaced_map_counts() -> None:
    model = build(presets.tiny())
    ffn = model.layers[0].ffn
    x = torch.randn(2, ffn.w1.weight.shape[1])
    with torch.inference_mode():
        before = ffn(x)
        ffn.w1 = Linear(ffn.w1.weight.shape[1], ffn.w1.weight.shape[0], zero_init=True)
        ffn.w2.weight.normal_()
        assert not torch.equal(ffn(x), before)
        assert not ffn(x).any()


def test_a_zero_row_stays_zero() -> None:
    layer = Linear(32, 4, zero_init=True)
    layer.pack_int8()
    assert torch.equal(layer(torch.randn(2, 32)), torch.zeros(2, 4))


@pytest.mark.parametrize("num_tokens", [1, INT8_MAX_ROWS, INT8_MAX_ROWS + 1])
def test_a_joint_product_is_that_of_each_map(num_tokens: int) -> None:
    maps = [Linear(64, width) for width in (24, 6, 33)]
    x = torch.randn(num_tokens, 64)
    with torch.inference_mode():
        before = [m(x) for m in maps]
        assert all(map(torch.equal, JointLinear()(x, *maps), before))
    for linear in maps:
        linear.pack_int8()
    with torch.inference_mode():
        alone = [m(x) for m in maps]
        joint = JointLinear()
        joint.pack_int8(*maps)
        assert all(map(torch.equal, joint(x, *maps), alone))
        assert all(map(torch.equal, [m(x) for m in maps], alone))
    assert joint.int8 is not None
    codes = joint.int8[0].untyped_storage().data_ptr()  # kept once
    assert [m.int8 and m.int8[0].untyped_storage().data_ptr() for m in maps] == [codes] * 3


@pytest.mark.parametrize("config", [presets.tiny(), presets.tiny_v32()], ids=["tied", "untied"])
def test_packed_model_decodes_like_its_own_full_forward(config: ModelConfig) -> None:
    model = build(config, noise=0.02)
    before = model.num_parameters()
    model.pack_int8()
    assert model.num_parameters() == before
    history = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert config.engram is not None
    with torch.inference_mode():
        full = model(torch.tensor([history]))[0].softmax(-1)
        cache = model.allocate_kv_cache(3, 16, "fp32")
        steps = []
        for i in range(40):
            meta = step_metadata(
                [(history, i, 1)],
                block_size=16,
                blocks=[[0, 1, 2]],
                ngram=config.engram.engram_max_ngram_size,
            )
            steps.append(model.forward_paged(meta, cache).softmax(-1))
    distance = (torch.cat(steps) - full).abs().sum(-1).mean() / 2
    assert 0 < distance <= 0.02, f"mean total variation {distance:.4f}"


def test_int8_is_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match="int8 needs device cpu, got cuda"):
        resolve_placement(EngineConfig(device="cuda", dtype="int8"), has_cuda=True)
