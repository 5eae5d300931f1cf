"""What a client may send: the OpenAI request bodies, checked strictly.

Every number is bounded, integers are never booleans, strings or floats, and an unknown field is
an error. `null` means "not given" for every optional field, as in OpenAI's API.

Accepted and ignored, because they cannot change the generated text here: IGNORED_FIELDS, and a
message's `name`. Fields OpenAI defines that this server cannot honour (`tools`,
`response_format`, ...) are accepted only with the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from model1.engine.request import MAX_LOGPROBS, MAX_TEMPERATURE

MAX_CHOICES = 8
MAX_PROMPTS = 128
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 300
MAX_MESSAGES = 2048
MAX_CONTENT_PARTS = 256
MAX_TOKEN_ID = 2**31 - 1
MAX_SEED = 2**63 - 1

IGNORED_FIELDS = (
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "store",
    "metadata",
    "service_tier",
    "verbosity",
    "reasoning_effort",
)

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Prompt = str | list[int]


def reject(message: str) -> PydanticCustomError:
    """An error whose whole text is ours; pydantic adds the place."""
    return PydanticCustomError("bad_value", "{message}", {"message": message})


def _is_token_ids(value: Any) -> bool:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= MAX_TOKEN_ID)


def as_prompts(value: Any) -> list[Prompt]:
    """One text, one list of token ids, or a list of either kind -> a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise reject(f"at most {MAX_PROMPTS} prompts are allowed, got {len(value)}")
        if all(isinstance(item, str) for item in value) or all(_is_token_ids(i) for i in value):
            return value
    raise reject(
        "must be a string, a list of strings, a list of token ids or a list of lists of token ids"
    )


def as_stop_strings(value: Any) -> list[str]:
    """One stop string or up to MAX_STOP_STRINGS of them, 1..MAX_STOP_CHARS characters each."""
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise reject("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise reject(f"at most {MAX_STOP_STRINGS} stop strings are allowed, got {len(strings)}")
    if not all(1 <= len(s) <= MAX_STOP_CHARS for s in strings):
        raise reject(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return strings


def as_logit_bias(value: Any) -> dict[int, float]:
    """{"token id": bias} with biases in [-100, 100]."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise reject(f"must be an object with at most {MAX_LOGIT_BIAS} entries")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and int(key[:11]) <= MAX_TOKEN_ID):
            raise reject(f"keys must be token ids, got {key[:32]!r}")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise reject(f"the bias of token {int(key)} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


class Body(BaseModel):
    """Base of every request part: no unknown fields, no type conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Body):
    """`include_usage` adds one last chunk with the token counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Body):
    """Fields that both endpoints share."""

    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_ID)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKEN_ID)
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKEN_ID)  # 0 and -1 switch it off
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[str] | None, BeforeValidator(as_stop_strings)] = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_TOKENS)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(as_logit_bias)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Ignored: see IGNORED_FIELDS.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "needs stream to be true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def field_error(name: str, message: str) -> PydanticCustomError:
    """An error about one field, raised by a check that sees the whole request."""
    return PydanticCustomError("bad_field", "{message}", {"message": message, "field": name})


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[Prompt], BeforeValidator(as_prompts)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise field_error(
                "logprobs",
                "cannot be combined with echo: log-probabilities of prompt tokens are not "
                "computed by this version",
            )
        return self


def as_text(value: Any) -> str:
    """Message content -> text: a string, or text parts that are joined as they are."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CONTENT_PARTS:
        raise reject(f"must be a string or a list of 1 to {MAX_CONTENT_PARTS} text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            name = kind[:32] if isinstance(kind, str) else kind
            raise reject(f"only parts of type 'text' are supported, got {name!r}")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise reject("a text part must be {'type': 'text', 'text': string}")
    return "".join(part["text"] for part in value)


class Message(Body):
    """One turn. The null-only fields let a client send an answer of this server back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(as_text)]
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def as_template_input(self) -> dict[str, str]:
        """The two keys a chat template reads; `developer` is OpenAI's newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class TextFormat(Body):
    """The only supported response format."""

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_ID)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: TextFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "needs logprobs to be true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise field_error("max_tokens", f"contradicts max_completion_tokens {both[1]}")
        return self
