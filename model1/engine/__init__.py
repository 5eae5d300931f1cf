"""Continuous-batching engine: requests in, tokens and text out, one `step` at a time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model1.engine.config import EngineConfig, resolve
    from model1.engine.engine import Engine, EngineStats
    from model1.engine.llm import LLM, Completion
    from model1.engine.request import RequestOutput, SamplingParams, TokenLogprob

__all__ = [
    "LLM",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
    "resolve",
]

_HOME = {
    "config": ("EngineConfig", "resolve"),
    "engine": ("Engine", "EngineStats"),
    "llm": ("LLM", "Completion"),
}


def __getattr__(name: str) -> Any:
    # On first use, so that the scheduler and request modules stay importable without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOME.items() if name in names), "request")
    return getattr(importlib.import_module(f"model1.engine.{home}"), name)
