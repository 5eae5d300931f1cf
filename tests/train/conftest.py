"""A small tokenizer, a small text folder and a short run, shared by the training tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from model1.tokenizer import Tokenizer, train_tokenizer
from model1.train.config import TrainConfig, load_train_config

CONFIGS = Path(__file__).parents[2] / "configs"
VERBS = ("read", "write", "sort", "merge", "count", "split")
NOUNS = ("row", "file", "table", "token", "block", "name")


def source_text(verb: str, noun: str) -> str:
    """One small Python module."""
    return f'''"""Tools that {verb} a {noun}."""


def {verb}_{noun}(items, limit=10):
    """{verb.title()} every {noun} of the items, at most limit of them.

    Returns a new list.
    """
    result = []
    for index, {noun} in enumerate(items):
        if index >= limit:
            break
        result.append({noun})
    return result


class {noun.title()}{verb.title()}er:
    """Keeps a {noun} so that it can {verb} it later."""

    def run(self, {noun}):
        """Run the {verb} step on one {noun}, with häßliche Umlaute."""
        self.last = {noun}
        return {verb}_{noun}([{noun}])
'''


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 modules in six packages."""
    folder = tmp_path_factory.mktemp("text")
    for noun in NOUNS:
        (folder / noun).mkdir()
        for verb in VERBS:
            path = folder / noun / f"{verb}.py"
            path.write_text(source_text(verb, noun), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(text_dir: Path) -> Tokenizer:
    """300 entries trained on the text folder."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_dir.rglob("*.py"))]
    return train_tokenizer(texts, vocab_size=300)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer on disk."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture
def make_config(text_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """configs/tiny.toml on the test's own folders, with overrides."""

    def make(*overrides: str, out: str = "run") -> TrainConfig:
        own = (
            f'out_dir="{tmp_path / out}"',
            f'data.tokenizer="{tokenizer_dir}"',
            f'data.train=["{text_dir}"]',
            f'data.cache_dir="{tmp_path / "cache"}"',
        )
        return load_train_config(CONFIGS / "tiny.toml", [*own, *overrides])

    return make
