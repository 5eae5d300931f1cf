"""The engine: requests in, one step at a time, outputs out.

Single-threaded: one thread owns an Engine and makes every call. Every request accepted by
`add_request` gets exactly one output with a finish_reason, whatever happens to it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from model1.cache.block_manager import BlockManager
from model1.engine.config import EngineConfig, resolve
from model1.engine.output import OutputStream, StreamingTokenizer, final_output
from model1.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from model1.engine.runner import ModelRunner
from model1.engine.sampler import SampledToken, Sampler
from model1.engine.scheduler import ScheduledRequest, Scheduler
from model1.errors import DeviceError, RequestError

if TYPE_CHECKING:
    from model1.nn.model import Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of this moment and counters since the start."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_steps: int
    prompt_tokens: int  # of accepted requests
    generation_tokens: int
    num_preemptions: int
    num_corrupted_requests: int  # ended by unusable logits or an error in sampling
    num_failed_steps: int  # the model's forward raised


class Engine:
    """Continuous batching of many requests over one model.

    The model stays on its device; a `config.device` that names another one raises DeviceError.
    """

    def __init__(
        self, model: Model, tokenizer: StreamingTokenizer, config: EngineConfig | None = None
    ) -> None:
        asked = EngineConfig() if config is None else config
        resolved = resolve(_on_model_device(asked, model), model.config)
        self._runner = ModelRunner(model, resolved)
        limit = model.config.max_position_embeddings
        self.config = _fit_model_len(resolved, limit, self._runner.num_blocks)
        self.tokenizer = tokenizer
        self._vocab_size = model.config.vocab_size
        self._block_manager = BlockManager(self._runner.num_blocks, self.config.block_size)
        assert self.config.max_num_batched_tokens is not None
        self._scheduler = Scheduler(
            self._block_manager,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
        )
        self._sampler = Sampler(tokenizer.stop_token_ids)
        self._requests: dict[str, Request] = {}  # until the final output is handed out
        self._streams: dict[str, OutputStream] = {}
        self._final: list[RequestOutput] = []  # ended between steps
        names = ("num_steps", "prompt_tokens", "generation_tokens")
        self._counts = dict.fromkeys((*names, "num_corrupted_requests", "num_failed_steps"), 0)

    @property
    def max_model_len(self) -> int:
        """Most tokens, prompt and generated together, that a request can have."""
        assert self.config.max_model_len is not None
        return self.config.max_model_len

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes of one token, all layers."""
        return self._runner.bytes_per_token

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Queue a request.

        Raises RequestError, changing nothing, for an id in use, an empty prompt, a token id outside
        the vocabulary, a prompt longer than max_model_len - 1 and a request that the cache cannot
        hold. A max_tokens beyond max_model_len ends in "length" there.
        """
        self._check(request_id, prompt_token_ids, params)
        request = Request(request_id, prompt_token_ids, params)
        stream = OutputStream(request, self.tokenizer, max_model_len=self.max_model_len)
        self._requests[request_id] = request
        self._streams[request_id] = stream
        self._scheduler.add(request)
        self._counts["prompt_tokens"] += request.num_prompt_tokens

    def abort(self, request_id: str) -> None:
        """End a request now; the next step hands out its final output. Unknown id: no-op."""
        if request_id in self._streams:
            self._final.append(self._end(self._requests[request_id], "abort"))

    def has_work(self) -> bool:
        """A step would run something or hand something out."""
        return bool(self._final) or self._scheduler.has_work()

    def step(self) -> list[RequestOutput]:
        """Run one forward over the planned tokens and return everything new.

        An error in one request's sampling or text ends that request with "error"; an error in the
        forward ends all running requests so and leaves the engine usable.
        """
        outputs, self._final = self._final, []
        step = self._scheduler.schedule()
        if step:
            self._counts["num_steps"] += 1
            outputs += self._run(step)
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        return outputs

    def stats(self) -> EngineStats:
        """The state of the engine in numbers."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_free_blocks=self._block_manager.num_free_blocks,
            num_blocks=self._block_manager.num_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            **self._counts,
        )

    def _run(self, step: list[ScheduledRequest]) -> list[RequestOutput]:
        requests = [part.request for part in step if part.needs_logits]
        try:
            logits = self._runner.forward(step)
        except Exception as error:  # whatever it was, every request must still end
            logger.exception("model forward failed; ending %d requests", len(step))
            self._counts["num_failed_steps"] += 1
            message = f"the model failed: {type(error).__name__}: {error}"
            return [self._end(r, "error", message) for r in list(self._scheduler.running)]
        self._scheduler.commit(step)
        sampled = self._sample(requests, logits)
        return [self._advance(r, s) for r, s in zip(requests, sampled, strict=True)]

    def _sample(self, requests: list[Request], logits: Tensor) -> list[SampledToken]:
        """One token per request; if the batch fails, each by itself to find who is at fault.

        Sampling changes no state, so the good requests get the tokens they would have got.
        """
        if not requests:
            return []
        try:
            return self._sampler.sample(requests, logits)
        except Exception:
            logger.exception("sampling a batch failed; sampling its requests one by one")
        sampled: list[SampledToken] = []
        for i, request in enumerate(requests):
            try:
                sampled += self._sampler.sample([request], logits[i : i + 1])
            except Exception as error:
                message = f"sampling failed: {type(error).__name__}: {error}"
                sampled.append(SampledToken(None, error=message))
        return sampled

    def _advance(self, request: Request, sampled: SampledToken) -> RequestOutput:
        if sampled.token_id is None:
            self._counts["num_corrupted_requests"] += 1
            return self._end(request, "error", sampled.error)
        try:
            stream = self._streams[request.request_id]
            output = stream.add(sampled.token_id, sampled.logprob)
        except Exception as error:
            logger.exception("detokenising request %r failed", request.request_id)
            message = f"detokenising failed: {type(error).__name__}: {error}"
            return self._end(request, "error", message)
        self._counts["generation_tokens"] += 1
        if output.finished:
            self._release(request)
        return output

    def _end(
        self, request: Request, reason: FinishReason, error: str | None = None
    ) -> RequestOutput:
        self._release(request)
        return final_output(request, reason, error=error)

    def _release(self, request: Request) -> None:
        self._scheduler.finish(request)
        self._sampler.forget(request.request_id)
        del self._streams[request.request_id]

    def _check(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        _check_prompt(prompt_token_ids, self._vocab_size, self.max_model_len)
        for name, ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", tuple(token_id for token_id, _ in params.logit_bias)),
        ):
            _check_ids(name, ids, self._vocab_size)
        # The last token generated is never fed back, so it takes no place in the cache.
        num_cached = min(len(prompt_token_ids) + params.max_tokens, self.max_model_len) - 1
        num_blocks = self._block_manager.num_blocks_for(num_cached)
        if num_blocks > self._block_manager.num_blocks:
            raise RequestError(
                f"the request may need {num_blocks} cache blocks "
                f"({len(prompt_token_ids)} prompt and {params.max_tokens} new tokens), "
                f"there are {self._block_manager.num_blocks}",
                param="max_tokens",
            )


def _check_prompt(prompt_token_ids: Sequence[int], vocab_size: int, max_model_len: int) -> None:
    if len(prompt_token_ids) == 0:
        raise RequestError("prompt must hold at least one token", param="prompt")
    if len(prompt_token_ids) > max_model_len - 1:
        raise RequestError(
            f"prompt must have at most {max_model_len - 1} tokens "
            f"(max_model_len {max_model_len} less one to generate), got {len(prompt_token_ids)}",
            param="prompt",
        )
    _check_ids("prompt", prompt_token_ids, vocab_size)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for token_id in ids:
        is_int = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_int or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name} must hold token ids in [0, {vocab_size}), got {token_id!r}", param=name
            )


def _on_model_device(config: EngineConfig, model: Model) -> EngineConfig:
    device = next(model.parameters()).device.type
    if config.device not in ("auto", device):
        raise DeviceError(f"device {config.device!r} was asked for, but the model is on {device!r}")
    return dataclasses.replace(config, device="cuda" if device == "cuda" else "cpu")


def _fit_model_len(config: EngineConfig, limit: int, num_blocks: int) -> EngineConfig:
    """Make max_model_len agree with a cache that is too small for it.

    The model's own limit, which is the default, means "as much as possible" and shrinks. A smaller
    value was asked for: a cache measured too small for it is an error; one given as num_blocks
    stands, and requests that do not fit are refused one by one.
    """
    assert config.max_model_len is not None
    num_slots = num_blocks * config.block_size
    if config.max_model_len <= num_slots:
        return config
    if config.max_model_len == limit:
        logger.warning("max_model_len is %d, not %d: the kv cache is full there", num_slots, limit)
        return dataclasses.replace(config, max_model_len=num_slots)
    if config.num_blocks is None:
        raise DeviceError(
            f"max_model_len {config.max_model_len} needs a larger kv cache than memory allows: "
            f"{num_slots} tokens"
        )
    return config
