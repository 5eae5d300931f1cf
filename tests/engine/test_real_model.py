"""The engine over the real model: paged, chunked, mixed and preempted equals the full forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model1.config import ModelConfig
from model1.engine.config import EngineConfig
from model1.engine.engine import Engine
from model1.engine.request import SamplingParams
from model1.nn.model import Model
from model1.presets import tiny, tiny_v32

from .fakes import FakeTokenizer, run_all


def build(config: ModelConfig) -> Model:
    torch.manual_seed(1)
    assert config.engram is not None
    size = config.engram.engram_compressed_vocab_size
    table = np.arange(config.vocab_size, dtype=np.int64) % size
    model = Model(config, compression_table=table).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the neutral starting values
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def best_next(model: Model, tokens: list[int]) -> list[int]:
    """The most likely token after each prefix, from one forward over everything."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]))[0].argmax(-1).tolist()


@pytest.mark.parametrize("config", [tiny(), tiny_v32()], ids=["model1", "v32"])
def test_pressed_and_chunked_requests_equal_the_full_forward(config: ModelConfig) -> None:
    model = build(config)
    options = EngineConfig(
        device="cpu", block_size=8, num_blocks=11, max_num_batched_tokens=11, max_num_seqs=5
    )
    engine = Engine(model, FakeTokenizer([b"x"] * 253), options)
    rng = np.random.default_rng(0)
    prompts = {str(n): rng.integers(3, 256, n).tolist() for n in (1, 20, 43, 60)}
    for name, prompt in prompts.items():
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        engine.add_request(name, prompt, params)
    results = run_all(engine)
    assert engine.stats().num_preemptions > 0
    for name, prompt in prompts.items():
        generated = list(results[name].token_ids)
        expected = best_next(model, prompt + generated)[len(prompt) - 1 : -1]
        assert generated == expected, name
        assert len(generated) == 12
