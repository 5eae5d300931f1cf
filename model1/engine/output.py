"""What a chosen token means for its request: new text, and whether and why the request ends."""

from __future__ import annotations

from typing import Protocol

from model1.engine.request import FinishReason, Request, RequestOutput, TokenLogprob
from model1.engine.sampler import stop_ids
from model1.engine.stop import StopBuffer


class TextDecoder(Protocol):
    """Turns tokens into text as they come; only complete characters leave it."""

    def push(self, token_id: int) -> str:
        """Text that this token completes."""
        ...

    def finish(self) -> str:
        """The rest: incomplete characters, decoded as they stand."""
        ...


class StreamingTokenizer(Protocol):
    """The part of a tokenizer that the engine uses."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """End of text and end of turn."""
        ...

    def stream(self, *, skip_special_tokens: bool = True) -> TextDecoder:
        """A decoder for one request; skipped special tokens have no text."""
        ...


class OutputStream:
    """The output side of one request."""

    def __init__(
        self, request: Request, tokenizer: StreamingTokenizer, *, max_model_len: int
    ) -> None:
        self._request = request
        self._decoder = tokenizer.stream(skip_special_tokens=request.params.skip_special_tokens)
        self._stop_buffer = StopBuffer(request.params.stop)
        self._stop_ids = stop_ids(request.params, tokenizer.stop_token_ids)
        self._max_tokens = min(request.params.max_tokens, max_model_len - request.num_prompt_tokens)

    def add(self, token_id: int, logprob: TokenLogprob | None) -> RequestOutput:
        """Append the token to the request and say what is new.

        An error in decoding leaves the request without the token.
        """
        num_generated_tokens = self._request.num_generated_tokens + 1
        may_stop = num_generated_tokens > self._request.params.min_tokens
        reason: FinishReason | None = None
        text = ""
        if may_stop and token_id in self._stop_ids:
            reason = "stop"
        else:
            text, stopped = self._stop_buffer.push(self._decoder.push(token_id), may_stop=may_stop)
            if stopped:
                return self._append(token_id, logprob, text, "stop")
            if num_generated_tokens >= self._max_tokens:
                reason = "length"
        if reason is not None:
            # An unfinished character becomes text only now and may complete a stop string.
            tail, stopped = self._stop_buffer.push(self._decoder.finish(), may_stop=may_stop)
            text += tail + self._stop_buffer.flush()
            reason = "stop" if stopped else reason
        return self._append(token_id, logprob, text, reason)

    def _append(
        self,
        token_id: int,
        logprob: TokenLogprob | None,
        text: str,
        reason: FinishReason | None,
    ) -> RequestOutput:
        request = self._request
        request.token_ids.append(token_id)
        return RequestOutput(
            request_id=request.request_id,
            text=text,
            token_ids=(token_id,),
            logprobs=None if logprob is None else (logprob,),
            finish_reason=reason,
            error=None,
            num_prompt_tokens=request.num_prompt_tokens,
            num_generated_tokens=request.num_generated_tokens,
        )


def final_output(
    request: Request, reason: FinishReason, *, error: str | None = None
) -> RequestOutput:
    """The last event of a request that ends without a new token; held text is dropped."""
    return RequestOutput(
        request_id=request.request_id,
        text="",
        token_ids=(),
        logprobs=None if request.params.logprobs is None else (),
        finish_reason=reason,
        error=error,
        num_prompt_tokens=request.num_prompt_tokens,
        num_generated_tokens=request.num_generated_tokens,
    )
