from __future__ import annotations

import pytest
import torch

from model1.errors import ConfigError
from model1.train.baseline import PlainConfig, PlainTransformer, match_parameters

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


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows: documents of 5 and 11 tokens, and one of 16."""
    ids = torch.randint(0, 50, (2, 16))
    starts = torch.zeros_like(ids)
    starts[0, 5:] = 5
    return ids, starts


@pytest.mark.parametrize("total", [300_000, 2_000_000, 24_000_000, 150_000_000])
def test_the_count_is_within_one_percent(total: int) -> None:
    config = match_parameters(
        total, vocab_size=8192 if total > 1e6 else 256, max_position_embeddings=64
    )
    assert config.num_parameters == pytest.approx(total, rel=0.01)


def test_the_count_is_that_of_the_module() -> None:
    model = PlainTransformer(CONFIG)
    assert model.num_parameters()["total"] == CONFIG.num_parameters
    assert PlainConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_impossible_sizes_are_errors() -> None:
    with pytest.raises(ConfigError, match="has 1000 parameters within 1 %"):
        match_parameters(1000, vocab_size=8192, max_position_embeddings=64)
    with pytest.raises(ConfigError, match=r"hidden_size must be a multiple .* got 33"):
        PlainConfig.from_dict({**CONFIG.to_dict(), "hidden_size": 33})


def test_packed_documents_are_independent_and_causal() -> None:
    model = PlainTransformer(CONFIG)
    ids, starts = packed()
    logits = model(ids, doc_starts=starts)
    torch.testing.assert_close(logits[:1, 5:], model(ids[:1, 5:]), rtol=1e-4, atol=1e-5)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    again = model(changed, doc_starts=starts)
    assert torch.equal(again[:, :9], logits[:, :9])
    assert not torch.equal(again[:, 9:], logits[:, 9:])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_both_attention_kernels_agree() -> None:
    sdpa, flex = PlainTransformer(CONFIG), PlainTransformer(CONFIG, attention="flex")
    flex.load_state_dict(sdpa.state_dict())
    ids, starts = packed()
    with torch.no_grad():
        expected = sdpa(ids, doc_starts=starts)
        torch.testing.assert_close(flex(ids, doc_starts=starts), expected, rtol=1e-4, atol=1e-5)
