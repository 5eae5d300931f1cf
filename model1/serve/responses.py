"""What the server answers: OpenAI's response objects as plain dicts, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from model1.engine.request import RequestOutput, TokenLogprob
from model1.serve.plan import Plan, ServedModel

Json = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """What one choice has produced so far."""

    index: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_generated: int = 0
    offset: int = 0  # characters of the token strings already sent

    def add(self, output: RequestOutput) -> None:
        """Take in one engine output."""
        self.texts.append(output.text)
        self.logprobs.extend(output.logprobs or ())
        self.finish_reason = output.finish_reason
        self.num_generated = output.num_generated_tokens


class ResponseFormat(Protocol):
    """One endpoint's way to write choices."""

    def opening(self, index: int) -> Json | None:
        """The chunk that precedes the first text of a choice, or None."""
        ...

    def chunk(self, choice: Choice, output: RequestOutput) -> Json:
        """One piece of a choice."""
        ...

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        """The last chunk of a stream that asked for usage."""
        ...

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The answer to a request that does not stream."""
        ...


class _Envelope:
    """The keys around the choices, the same for both endpoints."""

    def __init__(self, plan: Plan, model: ServedModel, kind: str) -> None:
        self.plan = plan
        self.model = model
        self.wants_logprobs = plan.jobs[0].params.logprobs is not None
        self._head = {"id": plan.response_id, "object": kind, "created": plan.created}

    def wrap(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "model": self.plan.model, "choices": choices}
        return {**chunk, "usage": None} if self.plan.include_usage else chunk

    def usage(self, choices: Sequence[Choice]) -> Json:
        num_prompt = sum(len(prompt) for prompt in self.plan.prompts)
        num_generated = sum(choice.num_generated for choice in choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        }


class CompletionFormat:
    """Objects of /v1/completions."""

    def __init__(self, plan: Plan, model: ServedModel) -> None:
        self._envelope = _Envelope(plan, model, "text_completion")
        self._plan = plan
        self._tokenizer = model.tokenizer

    def opening(self, index: int) -> Json | None:
        """The prompt, when the client asked for an echo."""
        if not self._plan.echo:
            return None
        choice = {"index": index, "text": self._echo(index), "logprobs": None}
        return self._envelope.wrap([{**choice, "finish_reason": None}])

    def chunk(self, choice: Choice, output: RequestOutput) -> Json:
        """New text of one choice."""
        logprobs = self._logprobs(choice, output.logprobs or ())
        body = {"index": choice.index, "text": output.text, "logprobs": logprobs}
        return self._envelope.wrap([{**body, "finish_reason": output.finish_reason}])

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        """No choices, the token counts."""
        return {**self._envelope.wrap([]), "usage": self._envelope.usage(choices)}

    def whole(self, choices: Sequence[Choice]) -> Json:
        """All choices and the token counts."""
        bodies = []
        for choice in choices:
            text = "".join(choice.texts)
            body = {
                "index": choice.index,
                "text": self._echo(choice.index) + text if self._plan.echo else text,
                "logprobs": self._logprobs(choice, choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            bodies.append(body)
        return {**self._envelope.wrap(bodies), "usage": self._envelope.usage(choices)}

    def _echo(self, index: int) -> str:
        prompt = self._plan.prompts[index // self._plan.n]
        return self._tokenizer.decode(prompt, skip_special_tokens=False)

    def _logprobs(self, choice: Choice, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not self._envelope.wants_logprobs:
            return None
        name = self._envelope.model.token_text
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(name(token.token_id))
        return {
            "tokens": [name(token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{name(i): value for i, value in token.top} for token in tokens],
            "text_offset": offsets,
        }


class ChatFormat:
    """Objects of /v1/chat/completions."""

    def __init__(self, plan: Plan, model: ServedModel) -> None:
        kind = "chat.completion.chunk" if plan.stream else "chat.completion"
        self._envelope = _Envelope(plan, model, kind)

    def opening(self, index: int) -> Json | None:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._envelope.wrap([choice])

    def chunk(self, choice: Choice, output: RequestOutput) -> Json:
        """New text of one choice."""
        body = {
            "index": choice.index,
            "delta": {"content": output.text} if output.text else {},
            "logprobs": self._logprobs(output.logprobs or ()),
            "finish_reason": output.finish_reason,
        }
        return self._envelope.wrap([body])

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        """No choices, the token counts."""
        return {**self._envelope.wrap([]), "usage": self._envelope.usage(choices)}

    def whole(self, choices: Sequence[Choice]) -> Json:
        """All choices and the token counts."""
        bodies = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._envelope.wrap(bodies), "usage": self._envelope.usage(choices)}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not self._envelope.wants_logprobs:
            return None
        content = []
        for token in tokens:
            top = [self._entry(token_id, value) for token_id, value in token.top]
            content.append({**self._entry(token.token_id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        model = self._envelope.model
        name, raw = model.token_text(token_id), model.token_bytes(token_id)
        return {"token": name, "logprob": logprob, "bytes": list(raw)}
