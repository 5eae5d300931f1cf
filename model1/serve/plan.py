"""From a checked request to the jobs the engine runs: tokenising, limits, sampling parameters."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from model1.engine.request import SamplingParams
from model1.serve.config import Limits
from model1.serve.errors import ApiError, shown
from model1.serve.protocol import ChatRequest, CompletionRequest, Prompt, SamplingFields
from model1.serve.worker import Job

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; chat uses what the context has


class TokenizerLike(Protocol):
    """The part of `model1.tokenizer.Tokenizer` that the server uses."""

    vocab_size: int
    special_tokens: dict[str, int]
    end_of_turn_token_id: int

    def encode(self, text: str) -> list[int]:
        """Text -> ids, never special ones."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids -> text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Raw bytes of one token, b"" for special ones."""
        ...

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Messages -> ids."""
        ...


class ServedModel:
    """What the HTTP layer knows of the model: its name, its tokenizer and its context."""

    def __init__(
        self,
        name: str,
        tokenizer: TokenizerLike,
        max_model_len: int,
        kv_bytes_per_token: int | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.kv_bytes_per_token = kv_bytes_per_token
        self.created = int(time.time())
        self.max_token_bytes = max(
            1, *(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        )

        self._special = {i: name.encode() for name, i in tokenizer.special_tokens.items()}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; of a special one its name."""
        return self._special.get(token_id) or self.tokenizer.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """A token as text; one that is no whole character is written as OpenAI does."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def check_name(self, name: str) -> None:
        """Raise the 404 of an unknown model."""
        if name != self.name:
            message = f"the model {shown(name)} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_text_fits(self, num_bytes: int, param: str) -> None:
        """Refuse a text that no tokenisation could fit into the context, before tokenising it."""
        self.check_prompt_fits(-(-num_bytes // self.max_token_bytes), param, at_least=True)

    def check_prompt_fits(self, num_tokens: int, param: str, *, at_least: bool = False) -> None:
        """Refuse a prompt that leaves no place for one generated token."""
        if num_tokens >= self.max_model_len:
            raise ApiError(
                400,
                f"the prompt has {'at least ' if at_least else ''}{num_tokens} tokens, but the "
                f"context holds {self.max_model_len} and one is needed for the answer",
                param=param,
                code="context_length_exceeded",
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """One client request, ready to run. Choice `i` belongs to prompt `i // n`."""

    response_id: str
    created: int
    model: str
    n: int
    prompts: tuple[list[int], ...]
    jobs: tuple[Job, ...]
    stream: bool
    include_usage: bool
    echo: bool


async def plan_completion(request: CompletionRequest, model: ServedModel, limits: Limits) -> Plan:
    """Tokenise and check a completion request; raises ApiError 400 or 404."""
    model.check_name(request.model)
    prompts = [await _encode_prompt(prompt, model) for prompt in request.prompt]
    return _plan(request, model, limits, prompts, "cmpl", request.logprobs, request.max_tokens)


async def plan_chat(request: ChatRequest, model: ServedModel, limits: Limits) -> Plan:
    """Render and check a chat request; raises ApiError 400 or 404."""
    model.check_name(request.model)
    messages = [message.as_template_input() for message in request.messages]
    model.check_text_fits(sum(len(m["content"].encode()) for m in messages), "messages")
    prompt = await asyncio.to_thread(model.tokenizer.apply_chat_template, messages)
    model.check_prompt_fits(len(prompt), "messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = request.max_completion_tokens or request.max_tokens
    return _plan(request, model, limits, [prompt], "chatcmpl", logprobs, max_tokens)


async def _encode_prompt(prompt: Prompt, model: ServedModel) -> list[int]:
    if isinstance(prompt, str):
        model.check_text_fits(len(prompt.encode()), "prompt")
        # encode releases the GIL, so a long prompt stalls neither the event loop nor the engine.
        prompt = await asyncio.to_thread(model.tokenizer.encode, prompt)
    if not prompt:
        raise ApiError(400, "the prompt must have at least one token", param="prompt")
    if max(prompt) >= model.tokenizer.vocab_size:
        message = f"token ids must be below {model.tokenizer.vocab_size}, got {max(prompt)}"
        raise ApiError(400, message, param="prompt")
    model.check_prompt_fits(len(prompt), "prompt")
    return prompt


def _plan(
    request: SamplingFields,
    model: ServedModel,
    limits: Limits,
    prompts: list[list[int]],
    id_prefix: str,
    logprobs: int | None,
    max_tokens: int | None,
) -> Plan:
    n = request.n or 1
    num_sequences = n * len(prompts)
    if num_sequences > limits.max_sequences_per_request:
        message = (
            f"{len(prompts)} prompts times n = {n} are {num_sequences} sequences, "
            f"at most {limits.max_sequences_per_request} are allowed"
        )
        raise ApiError(400, message, param="n")
    is_chat = id_prefix == "chatcmpl"
    jobs = []
    for prompt in prompts:
        budget = _budget(model, len(prompt), max_tokens, is_chat=is_chat)
        for choice in range(n):
            params = _sampling_params(request, model, logprobs, budget, choice, is_chat)
            jobs.append(Job(prompt, params))
    return Plan(
        response_id=f"{id_prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=model.name,
        n=n,
        prompts=tuple(prompts),
        jobs=tuple(jobs),
        stream=bool(request.stream),
        include_usage=request.include_usage,
        echo=isinstance(request, CompletionRequest) and bool(request.echo),
    )


def _budget(model: ServedModel, num_prompt: int, asked: int | None, *, is_chat: bool) -> int:
    """Tokens to generate: what was asked, or a default clamped to the rest of the context."""
    rest = model.max_model_len - num_prompt
    if asked is None:
        return rest if is_chat else min(COMPLETION_MAX_TOKENS, rest)
    if asked > rest:
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens and max_tokens is {asked}, but the context "
            f"holds {model.max_model_len}: at most {rest} can be generated",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return asked


def _sampling_params(
    request: SamplingFields,
    model: ServedModel,
    logprobs: int | None,
    max_tokens: int,
    choice: int,
    is_chat: bool,
) -> SamplingParams:
    stop_ids = set(request.stop_token_ids or ())
    bias = request.logit_bias or {}
    for name, ids in (("stop_token_ids", stop_ids), ("logit_bias", set(bias))):
        if max(ids, default=0) >= model.tokenizer.vocab_size:
            message = f"token ids must be below {model.tokenizer.vocab_size}, got {max(ids)}"
            raise ApiError(400, f"{name}: {message}", param=name)
    if is_chat and not request.ignore_eos:
        stop_ids.add(model.tokenizer.end_of_turn_token_id)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        # Choices of one prompt must differ, and must not depend on each other.
        seed=None if request.seed is None else (request.seed + choice) % 2**63,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        stop=tuple(request.stop or ()),
        stop_token_ids=tuple(sorted(stop_ids)),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        logit_bias=tuple(sorted(bias.items())),
        skip_special_tokens=request.skip_special_tokens is not False,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
