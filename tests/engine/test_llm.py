from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model1.engine import llm as llm_module
from model1.engine.llm import LLM
from model1.engine.request import SamplingParams
from model1.errors import ConfigError, RequestError

from .fakes import FakeModel, FakeTokenizer, naive_generate

ONE = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)


class ChatTokenizer(FakeTokenizer):
    def encode(self, text: str) -> list[int]:
        return [self.pieces.index(c.encode()) for c in text]

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        return [i for message in messages for i in self.encode(message["content"])]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the fake loader was asked for."""
    calls: list[Any] = []

    def load_model(path: Path, **options: Any) -> tuple[FakeModel, ChatTokenizer]:
        calls.append((path, options))
        return FakeModel(), ChatTokenizer()

    monkeypatch.setattr(FakeModel, "pack_int8", lambda self: calls.append("int8"), raising=False)
    monkeypatch.setattr(llm_module, "load_model", load_model)
    monkeypatch.setattr(llm_module, "default_checkpoint", lambda: Path("shipped"))
    return calls


def test_texts_and_token_ids_are_completed_in_order(loaded: list[Any]) -> None:
    llm = LLM(device="cpu", max_num_seqs=2)
    assert loaded == [(Path("shipped"), {"device": "cpu", "dtype": torch.float32}), "int8"]
    by_text = llm.generate(["abc", "d", "ef"], ONE)
    ids = [llm.tokenizer.encode(text) for text in ("abc", "d", "ef")]
    assert [c.token_ids for c in by_text] == [naive_generate(i, ONE)[0] for i in ids]
    assert [c.text for c in by_text] == [llm.tokenizer.decode(c.token_ids) for c in by_text]
    assert [c.num_prompt_tokens for c in by_text] == [3, 1, 2]
    assert {c.finish_reason for c in by_text} == {"length"}
    assert llm.generate(ids, [ONE, ONE, ONE]) == by_text
    assert llm.generate("abc", ONE) == by_text[:1]
    assert llm.generate([]) == []


def test_chat_takes_one_conversation_or_several(loaded: list[Any]) -> None:
    llm = LLM("some/checkpoint", device="cpu")
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert llm.chat(messages, ONE) == llm.generate("abc", ONE)
    assert llm.chat([messages, messages[:1]], ONE) == llm.generate(["abc", "ab"], ONE)


def test_logprobs_are_joined(loaded: list[Any]) -> None:
    params = SamplingParams(max_tokens=4, logprobs=1, ignore_eos=True)
    (completion,) = LLM(device="cpu").generate("a", params)
    assert completion.logprobs is not None
    assert tuple(entry.token_id for entry in completion.logprobs) == completion.token_ids


def test_a_refused_prompt_raises_and_leaves_nothing_running(loaded: list[Any]) -> None:
    llm = LLM(device="cpu", max_model_len=16)
    with pytest.raises(RequestError, match="at most 15 tokens"):
        llm.generate(["a", "b" * 16], ONE)
    assert llm.generate("a", ONE)[0].finish_reason == "length"
    assert llm.engine.stats().num_free_blocks == llm.engine.stats().num_blocks
    with pytest.raises(RequestError, match="as many as prompts 2, got 1"):
        llm.generate(["a", "b"], [ONE])


def test_options_are_those_of_the_engine_config(loaded: list[Any]) -> None:
    with pytest.raises(TypeError, match="max_num_seq"):
        LLM(max_num_seq=3)
    with pytest.raises(ConfigError, match="block_size"):
        LLM(block_size=0)
    assert not loaded
