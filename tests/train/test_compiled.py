from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch._dynamo import config as dynamo

from model1 import presets
from model1.nn.model import Model
from model1.train.baseline import PlainConfig, PlainTransformer
from model1.train.compiled import autocast, compile_parts
from model1.train.config import LossSection
from model1.train.data import Batch
from model1.train.loss import chunk_loss_sum, training_loss

CPU = torch.device("cpu")
CONFIG = PlainConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=64,
    num_attention_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)


def batch() -> Batch:
    ids = torch.randint(0, 50, (2, 17))
    return Batch(ids[:, :-1], ids[:, 1:], torch.zeros(2, 16, dtype=torch.int64))


def tiny_with_all(*, single_pass: bool = False) -> Model:
    """Every part on but dense attention, with a second head; away from the zero start."""
    config = dataclasses.replace(presets.tiny(), num_nextn_predict_layers=1)
    assert config.mhc is not None
    streams = dataclasses.replace(config.mhc, single_pass=single_pass)
    config = dataclasses.replace(config, mhc=streams)
    model = Model(config, compression_table=np.arange(256) % 200)
    model.dense_attention = True
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def test_nothing_is_compiled_unless_asked() -> None:
    model = PlainTransformer(CONFIG)
    trainable, chunk_loss = compile_parts(model, "none")
    assert trainable is model
    assert chunk_loss is chunk_loss_sum


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("how", ["blocks", "model"])
@pytest.mark.parametrize("kind", ["plain", "model1", "single pass"])
def test_compiled_training_gives_the_same_loss_and_gradients(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graphs are captured but run by PyTorch: no compiler is needed on the test machine.
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: original(*a, **{**k, "backend": "eager"}))
    model: Model | PlainTransformer = PlainTransformer(CONFIG)
    if kind != "plain":
        model = tiny_with_all(single_pass=kind == "single pass")
    rows = batch()
    settings = LossSection(chunk_tokens=16)
    expected = training_loss(model, rows, settings)["loss"]
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with dynamo.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # restored after
        trainable, chunk_loss = compile_parts(model, how)
        loss = training_loss(trainable, rows, settings, chunk_loss=chunk_loss)["loss"]
        loss.backward()
    torch.testing.assert_close(loss, expected)
    trained = [p for p in model.parameters() if p.grad is not None]
    for parameter, grad in zip(trained, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    torch._dynamo.reset()


def test_bf16_changes_products_but_not_weights() -> None:
    model = PlainTransformer(CONFIG)
    with autocast(CPU, "bf16"):
        assert model.layers[0].q_proj(torch.randn(3, 32)).dtype == torch.bfloat16  # type: ignore[operator, union-attr]
    assert model.embed.weight.dtype == torch.float32
    with autocast(CPU, "fp32"):
        assert model.layers[0].q_proj(torch.randn(3, 32)).dtype == torch.float32  # type: ignore[operator, union-attr]
