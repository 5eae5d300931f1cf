from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model1.errors import DataError
from model1.tokenizer import Tokenizer
from model1.train.corpus import Document
from model1.train.finetune import (
    Definition,
    Exchange,
    all_chat_examples,
    chat_cache,
    chat_example,
    definitions,
    exchanges,
    module_name,
)

SOURCE = '''
def loads(text, *, strict=True) -> dict:
    """Read JSON text into a dictionary.

    Details that no answer repeats.
    """
    return parse(text)


class Parser(Base):
    """Keeps the state of one parse."""

    @staticmethod
    async def feed(self, part: str):
        """Take the next part of
        the text."""

    def _hidden(self):
        """Nobody should ask about this."""


def undocumented():
    return 1


def short():
    """Too short."""
'''


def document(text: str = SOURCE, path: str = "json/__init__.py") -> Document:
    return Document("json", path, text)


def test_documented_public_names_are_found() -> None:
    found = list(definitions(document()))
    assert [d.name for d in found] == ["json.loads", "json.Parser", "json.Parser.feed"]
    loads, parser, feed = found
    assert loads.summary == "Read JSON text into a dictionary."
    assert loads.signature == "def loads(text, *, strict=True) -> dict"
    assert loads.source == "def loads(text, *, strict=True) -> dict:\n    return parse(text)"
    assert parser.signature == "class Parser(Base)"
    assert feed.signature == "async def feed(self, part: str)"
    assert feed.summary == "Take the next part of the text."
    assert feed.source == ""


def test_text_that_is_not_python_has_none() -> None:
    assert list(definitions(document("def broken(:\n"))) == []
    assert list(definitions(document("\0"))) == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("json/__init__.py", "json"),
        ("src/a/b.py", "a.b"),
        ("six.py", "six"),
        ("__init__.py", "__init__"),
    ],
)
def test_module_names(path: str, name: str) -> None:
    assert module_name(path) == name


def test_exchanges_are_the_same_every_time_and_about_the_name() -> None:
    made = [
        Definition(f"pkg.name_{i}", "Joins two tables", f"def name_{i}(a)", "def f(): pass")
        for i in range(60)
    ]
    first = [e for d in made for e in exchanges(d)]
    assert first == [e for d in made for e in exchanges(d)]
    assert 60 < len(first) < 180
    kinds = {e.question.split("name_")[0] for e in first}
    assert len(kinds) > 10
    for definition in made:
        for exchange in exchanges(definition):
            about = definition.name.split(".")[-1] in exchange.question
            assert about or "Joins two tables." in exchange.question
            assert "{" not in exchange.question


def test_only_the_answer_is_learned(tokenizer: Tokenizer) -> None:
    exchange = Exchange("What does loads do? <|end|>", "It reads.\n```python\nx\n```")
    ids, mask = chat_example(exchange, tokenizer)
    assert mask is not None
    learned = ids[mask == 1]
    assert learned[-1] == tokenizer.end_of_turn_token_id
    assert tokenizer.decode(learned.tolist()) == exchange.answer
    assert tokenizer.decode(ids[mask == 0].tolist()) == exchange.question
    assert ids[-1] == tokenizer.eos_token_id
    assert mask[-1] == 0
    # The question's text cannot end the turn.
    assert (ids == tokenizer.end_of_turn_token_id).sum() == 2


def test_long_and_repeated_exchanges_are_left_out(tokenizer: Tokenizer) -> None:
    once = list(all_chat_examples([document()], tokenizer, 4096))
    assert len(list(all_chat_examples([document()] * 2, tokenizer, 4096))) == len(once) >= 3
    longest = max(len(example.token_ids) for example, _ in once)
    assert len(list(all_chat_examples([document()], tokenizer, longest - 1))) < len(once)


@pytest.mark.slow  # each process loads torch
def test_several_processes_give_the_same_examples(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [document(path=f"module_{i}.py") for i in range(4)]
    alone = list(all_chat_examples(documents, tokenizer, 4096))
    monkeypatch.setattr("model1.train.finetune.CHUNK_DOCUMENTS", 2)
    together = list(all_chat_examples(documents, tokenizer, 4096))
    assert len(alone) == len(together)
    for (one, _), (two, _) in zip(alone, together, strict=True):
        assert one.token_ids.tolist() == two.token_ids.tolist()


def test_the_cache_keeps_the_mask(tokenizer: Tokenizer, text_dir: Path, tmp_path: Path) -> None:
    make = (str(text_dir),), tokenizer, str(tmp_path), (".py",), 4096
    cache = chat_cache(*make)
    assert cache.loss_mask is not None
    assert len(cache.loss_mask) == len(cache.tokens)
    assert 0.2 < float(np.mean(cache.loss_mask)) < 0.95
    again = chat_cache(*make)
    assert np.array_equal(cache.tokens, again.tokens)


def test_text_without_docstrings_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(DataError, match="the sources give no example for chat-"):
        chat_cache((str(tmp_path),), tokenizer, str(tmp_path / "cache"), (".py",), 4096)
    assert not (tmp_path / "cache").exists()
