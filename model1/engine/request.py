"""One generation request: what is asked (`SamplingParams`), its state, and what comes back.

Plain Python on purpose: scheduling is tested without tensors. A request's tokens are the only
truth about it; everything else (cache blocks, n-gram windows, random numbers, penalty counts) is a
function of them, so a request can be preempted anywhere and recomputed to the same result.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Any, Literal

from model1.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TEMPERATURE = 2.0  # OpenAI's limit
MIN_TEMPERATURE = 1e-5  # below it sampling is greedy: fp32 cannot tell the two apart
MAX_LOGPROBS = 20  # OpenAI's limit for top_logprobs
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256  # per string; bounds the text held back
MAX_TOKEN_LIST = 1024  # entries of stop_token_ids and of logit_bias
_INT64 = 1 << 63


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. A bad value raises `RequestError`.

    Order: logit_bias, penalties, temperature, min_p, top_k, top_p (each on what the one before
    left). top_k and top_p keep tokens tied with the last one kept. Presence and frequency penalties
    count generated tokens, the repetition penalty covers prompt and generated tokens. Below
    `min_tokens` generated tokens no stop token can be drawn and no stop string ends the text.
    The text leaves out the stop string or the text of the stop token; `token_ids` has all tokens.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy, at most MAX_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    seed: int | None = None  # None = a fresh random one
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # besides the tokenizer's own
    ignore_eos: bool = False  # the tokenizer's own stop tokens do not end the request
    logprobs: int | None = None  # number of alternatives per token; 0 = the chosen token only
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, value added to its logit
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, _INT64 - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_float("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check_float("top_p", self.top_p, 0.0, 1.0, exclude_low=True)
        _check_int("top_k", self.top_k, 0, _INT64 - 1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -_INT64, _INT64 - 1)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, exclude_low=True)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, f"must be true or false, got {value!r}")
        self._check_lists()

    def _check_lists(self) -> None:
        _check_tuple("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            ok = isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARS
            shown = repr(text) if len(repr(text)) < 80 else f"{len(text)} characters"
            _require(ok, "stop", f"must hold strings of 1 to {MAX_STOP_CHARS}, got {shown}")
        _check_tuple("stop_token_ids", self.stop_token_ids, MAX_TOKEN_LIST)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, _INT64 - 1)
        _check_tuple("logit_bias", self.logit_bias, MAX_TOKEN_LIST)
        for entry in self.logit_bias:
            ok = isinstance(entry, tuple) and len(entry) == 2
            _require(ok, "logit_bias", f"must hold (token id, value) pairs, got {entry!r}")
            _check_int("logit_bias", entry[0], 0, _INT64 - 1)
            _check_float("logit_bias", entry[1], -100.0, 100.0)
        ids = [token_id for token_id, _ in self.logit_bias]
        _require(len(set(ids)) == len(ids), "logit_bias", "must not name a token twice")

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken; nothing is drawn."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Logits depend on which tokens the request already holds."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one generated token under the model's unmodified logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # most likely first


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one request. The last one, and only it, has a `finish_reason`."""

    request_id: str
    text: str  # new text; never any part of a stop string
    token_ids: tuple[int, ...]  # new tokens, a stop token included
    logprobs: tuple[TokenLogprob, ...] | None  # one per new token; None = not asked for
    finish_reason: FinishReason | None
    error: str | None  # set exactly when finish_reason is "error"
    num_prompt_tokens: int
    num_generated_tokens: int  # so far, the new ones included

    @property
    def finished(self) -> bool:
        """No further output of this request will come."""
        return self.finish_reason is not None


class RequestStatus(Enum):
    """Where a request is. WAITING holds no blocks; a preempted request waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """A request inside the engine. Only the scheduler writes `status` and the counts."""

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0  # tokens whose KV is in the cache
    num_preemptions: int = 0
    token_ids: list[int] = field(init=False)  # prompt, then generated
    num_prompt_tokens: int = field(init=False)
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        seed = self.params.seed
        self.seed = secrets.randbits(63) if seed is None else seed

    @property
    def num_tokens(self) -> int:
        """Prompt plus generated tokens."""
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def uniform(self) -> float:
        """The random number in [0, 1) for the next token: a function of seed and token count.

        Being stateless it cannot depend on batch mates, preemption or a repeated draw. 48 bits,
        so that u * total < total holds in float64 for any total.
        """
        counter = self.num_generated_tokens.to_bytes(8, "little")
        key = self.seed.to_bytes(8, "little", signed=True)
        return int.from_bytes(blake2b(counter, key=key, digest_size=6).digest(), "little") / 2**48


def _require(ok: bool, name: str, rule: str) -> None:
    if not ok:
        raise RequestError(f"{name} {rule}", param=name)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int, name, f"must be an integer, got {value!r}")
    limit = f"at least {low}" if high >= _INT64 - 1 and value < low else f"in [{low}, {high}]"
    _require(low <= value <= high, name, f"must be {limit}, got {value}")


def _check_float(
    name: str, value: Any, low: float, high: float, *, exclude_low: bool = False
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    _require(is_number and math.isfinite(value), name, f"must be a finite number, got {value!r}")
    ok = low <= value <= high and not (exclude_low and value == low)
    _require(ok, name, f"must be in {'(' if exclude_low else '['}{low}, {high}], got {value}")


def _check_tuple(name: str, value: Any, max_len: int) -> None:
    _require(isinstance(value, tuple), name, f"must be a tuple, got {type(value).__name__}")
    _require(len(value) <= max_len, name, f"must have at most {max_len} items, got {len(value)}")
