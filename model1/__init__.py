"""Model1: train, serve and extend language models with a small memory footprint.

The public names, imported on first use so that `import model1` alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model1 import errors
    from model1.config import ModelConfig
    from model1.engine.llm import LLM
    from model1.engine.request import SamplingParams
    from model1.nn.model import Model
    from model1.tokenizer import Tokenizer

__all__ = ["LLM", "Model", "ModelConfig", "SamplingParams", "Tokenizer", "errors"]

_HOME = {
    "LLM": "model1.engine.llm",
    "Model": "model1.nn.model",
    "ModelConfig": "model1.config",
    "SamplingParams": "model1.engine.request",
    "Tokenizer": "model1.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("model1.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'model1' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
