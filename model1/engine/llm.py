"""Offline generation: prompts in, completions out, one engine behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model1.engine.config import EngineConfig, resolve_placement
from model1.engine.engine import Engine
from model1.engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprob
from model1.errors import RequestError
from model1.weights import default_checkpoint, load_model

Message = Mapping[str, str]
_DTYPES = {"int8": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The whole answer to one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None  # set exactly when finish_reason is "error"
    logprobs: tuple[TokenLogprob, ...] | None
    num_prompt_tokens: int


class LLM:
    """A model, its tokenizer and an engine in this thread.

    `path` is a checkpoint directory, None the shipped one; options are the fields of EngineConfig
    (an unknown one is a TypeError). Raises CheckpointError, ConfigError, DeviceError and, for a
    backend that cannot run the model here, BackendUnavailable.
    """

    def __init__(self, path: str | Path | None = None, **options: Any) -> None:
        config = resolve_placement(EngineConfig(**options))
        path = default_checkpoint() if path is None else path
        model, self.tokenizer = load_model(path, device=config.device, dtype=_DTYPES[config.dtype])
        if config.dtype == "int8":
            model.pack_int8()
        self.engine = Engine(model, self.tokenizer, config)
        self._num_requests = 0

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete each prompt, text or token ids; one completion per prompt, in order.

        `params` is one for all or one per prompt. Raises RequestError, with nothing run, if a
        prompt or parameter is refused. A request that fails while running does not raise: its
        completion has finish_reason "error".
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        prompt_ids = [
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in prompts
        ]
        return self._run(prompt_ids, params)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer one conversation (a list of role/content messages) or a list of conversations."""
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        prompt_ids = [
            self.tokenizer.apply_chat_template([dict(message) for message in conversation])  # type: ignore[arg-type]
            for conversation in conversations
        ]
        return self._run(prompt_ids, params)

    def _run(
        self, prompt_ids: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Completion]:
        each = _per_prompt(params, len(prompt_ids))
        first = self._num_requests
        self._num_requests += len(prompt_ids)
        outputs: dict[str, list[RequestOutput]] = {
            f"llm-{first + i}": [] for i in range(len(prompt_ids))
        }
        try:
            for request_id, ids, one in zip(outputs, prompt_ids, each, strict=True):
                self.engine.add_request(request_id, ids, one)
            num_open = len(outputs)
            while num_open:
                for output in self.engine.step():
                    if output.request_id in outputs:  # else: what an interrupted call left behind
                        outputs[output.request_id].append(output)
                        num_open -= output.finished
        except BaseException:  # a refused request or Ctrl-C: leave nothing running
            for request_id in outputs:
                self.engine.abort(request_id)
            raise
        return [_join(parts) for parts in outputs.values()]


def _join(outputs: Sequence[RequestOutput]) -> Completion:
    last = outputs[-1]
    assert last.finish_reason is not None
    logprobs = tuple(entry for output in outputs for entry in output.logprobs or ())
    return Completion(
        text="".join(output.text for output in outputs),
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        finish_reason=last.finish_reason,
        error=last.error,
        logprobs=None if last.logprobs is None else logprobs,
        num_prompt_tokens=last.num_prompt_tokens,
    )


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(
            f"params must be one or as many as prompts {count}, got {len(params)}", param="params"
        )
    return params
