from __future__ import annotations

import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model1.errors import DataError
from model1.evals.__main__ import main
from model1.evals.bits_per_byte import (
    EvalSettings,
    bits_per_byte,
    document_nats,
    gzip_size,
    subset,
    xz_size,
)
from model1.evals.report import evaluate_checkpoint, format_table
from model1.tokenizer import Tokenizer, train_tokenizer
from model1.train.baseline import PlainConfig, PlainTransformer
from model1.train.checkpoint import write_checkpoint
from model1.train.corpus import Document

CPU = torch.device("cpu")
TEXTS = [f"def function_{i}(x):\n    return x + {i}\n" * (1 + i % 4) for i in range(12)]
DOCUMENTS = [Document("ab"[i % 2], f"{i:02}.py", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=290)


@pytest.fixture
def model(tokenizer: Tokenizer) -> PlainTransformer:
    config = PlainConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
    )
    model = PlainTransformer(config)
    with torch.no_grad():
        model.embed.weight.mul_(30)  # a guess that is far from uniform
    return model.eval()


class Uniform:
    """Says nothing about any token."""

    output_weight = torch.zeros(290, 4)

    def forward_hidden(
        self, input_ids: Tensor, *, doc_starts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.ones(*input_ids.shape, 4), {}


def settings(seq_len: int = 32, **changes: Any) -> EvalSettings:
    return EvalSettings(**{"seq_len": seq_len, "stride": seq_len, **changes})


@pytest.mark.parametrize("stride", [32, 8])
def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary(
    tokenizer: Tokenizer, stride: int
) -> None:
    scores = bits_per_byte(Uniform(), tokenizer, DOCUMENTS, settings(stride=stride), device=CPU)
    assert [s.name for s in scores] == ["a", "b", "total"]
    for score in scores:
        assert score.model_nats == pytest.approx(score.num_tokens * math.log(290), rel=1e-6)
    total = scores[-1]
    assert total.num_bytes == sum(len(t.encode()) for t in TEXTS)
    assert total.num_documents == 12
    bits = total.num_tokens * math.log2(290) / total.num_bytes
    assert total.model == pytest.approx(bits, rel=1e-6)


def test_packing_changes_no_score(model: PlainTransformer) -> None:
    documents = [
        np.random.default_rng(i).integers(9, 290, size=n) for i, n in enumerate((1, 2, 9, 20))
    ]
    together = document_nats(model, documents, settings(batch_rows=2), device=CPU)
    for tokens, nats in zip(documents, together, strict=True):
        ids = torch.from_numpy(tokens)[None]
        with torch.no_grad():
            losses = torch.log_softmax(model(ids), -1)[0, :-1].gather(1, ids[0, 1:, None])
        assert nats == pytest.approx(-float(losses.double().sum()), rel=1e-5, abs=1e-9)


def test_windows_score_each_token_once_and_context_is_earlier_text(model: PlainTransformer) -> None:
    tokens = np.random.default_rng(0).integers(9, 290, size=41)
    ids = torch.from_numpy(tokens)[None]

    def expected(begin: int, first: int, last: int) -> float:
        with torch.no_grad():
            logits = torch.log_softmax(model(ids[:, begin:last]), -1)[0]
        return -sum(float(logits[i - 1 - begin, tokens[i]]) for i in range(first, last + 1))

    cut = document_nats(model, [tokens], settings(16), device=CPU)
    parts = expected(0, 1, 16) + expected(16, 17, 32) + expected(32, 33, 40)
    assert cut[0] == pytest.approx(parts, rel=1e-5)
    overlapping = document_nats(model, [tokens], settings(16, stride=12), device=CPU)
    parts = expected(0, 1, 16) + expected(12, 17, 28) + expected(24, 29, 40)
    assert overlapping[0] == pytest.approx(parts, rel=1e-5)


def test_compressors_match_the_usual_commands() -> None:
    data = "".join(TEXTS).encode() * 50
    assert gzip_size(data) == len(gzip.compress(data, 9))
    assert xz_size(data) == pytest.approx(
        len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)), abs=16
    )
    assert xz_size(b"") > 0


def test_a_subset_is_whole_documents_and_repeats() -> None:
    chosen = subset(DOCUMENTS, 300)
    assert chosen == subset(list(reversed(DOCUMENTS)), 300)
    assert 0 < sum(len(d.text.encode()) for d in chosen) <= 300
    assert subset(DOCUMENTS, None) == sorted(DOCUMENTS, key=lambda d: (d.package, d.path))
    with pytest.raises(DataError, match="no document fits into max_bytes 3"):
        subset(DOCUMENTS, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"stride": 33}, "stride must be in .*, got 33"),
        ({"precision": "fp8"}, "precision must be 'fp32' or 'bf16', got 'fp8'"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        settings(**changes)


def test_a_checkpoint_is_measured_from_the_command_line(
    model: PlainTransformer,
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, text = tmp_path / "model", tmp_path / "text"
    write_checkpoint(folder, config=model.config.to_dict(), model=model, tokenizer=tokenizer)
    text.mkdir()
    for document in DOCUMENTS:
        (text / document.path).write_text(document.text)
    scores = evaluate_checkpoint(folder, [text], settings())
    table = format_table(scores)
    assert table.splitlines()[-1].startswith("total")
    assert f"{scores[-1].model:.4f}" in table
    arguments = [str(folder), "--data", str(text), "--seq-len", "32"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed[-1]["bits_per_byte"]["model"] == pytest.approx(scores[-1].model)
    assert main([*arguments, "--stride", "99"]) == 1
    assert "stride must be in" in capsys.readouterr().err
