"""A model and a tokenizer small enough to predict, and a loop that predicts them.

FakeModel's logits are a function of the token history that it finds through the step's metadata:
it stores token ids by slot and reads them back through the block table, so a wrong slot, table,
length or position gives a different history and so a different answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from model1.engine.config import EngineConfig
from model1.engine.engine import Engine
from model1.engine.request import Request, RequestOutput, SamplingParams
from model1.nn.metadata import AttentionMetadata

VOCAB_SIZE = 48
EOS, PAD, END = 0, 1, 2
NGRAM_SIZE = 3
UNWRITTEN = -99

History = tuple[int, ...]
Edit = Callable[[History, np.ndarray], np.ndarray]


@dataclass
class FakeCache:
    num_blocks: int
    block_size: int
    token_ids: np.ndarray  # by slot
    bytes_per_token: int = 8


def raw_logits(history: History) -> np.ndarray:
    """float32 [v], a function of the whole history."""
    seed = list(history) or [0]
    logits = np.random.default_rng(seed).standard_normal(VOCAB_SIZE) * 2.0
    logits[[EOS, END]] -= 1.0  # long enough generations
    return logits.astype(np.float32)


class FakeModel(torch.nn.Module):
    """`edit(history, logits)` may change a row's logits or raise."""

    def __init__(self, *, max_len: int = 4096, edit: Edit | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.edit = edit
        self.num_forwards = 0
        self.max_tokens_seen = 0
        self.config = SimpleNamespace(
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=max_len,
            engram=SimpleNamespace(engram_max_ngram_size=NGRAM_SIZE),
        )

    def allocate_kv_cache(self, num_blocks: int, block_size: int, kind: str) -> FakeCache:
        slots = np.full(num_blocks * block_size, UNWRITTEN, dtype=np.int64)
        return FakeCache(num_blocks, block_size, slots)

    def check_backend(self, backend: str) -> None:
        assert backend == "auto"

    def forward_paged(self, meta: AttentionMetadata, kv_cache: FakeCache, backend: str) -> Tensor:
        self.num_forwards += 1
        self.max_tokens_seen = max(self.max_tokens_seen, len(meta.token_ids))
        kv_cache.token_ids[meta.slot_mapping.numpy()] = meta.token_ids.numpy()
        seen_by_row: list[History] = []
        for i, (query_len, cache_len) in enumerate(
            zip(meta.query_lens, meta.cache_seqlens, strict=True)
        ):
            tokens = self._read(meta.block_table[i].numpy(), cache_len, kv_cache)
            seen_by_row += [tokens[: p + 1] for p in range(cache_len - query_len, cache_len)]
        check_rows(meta, seen_by_row)
        rows = [self._logits(seen_by_row[row]) for row in meta.logits_rows.tolist()]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, VOCAB_SIZE)

    def _logits(self, history: History) -> np.ndarray:
        logits = raw_logits(history)
        return logits if self.edit is None else self.edit(history, logits)

    @staticmethod
    def _read(block_table: np.ndarray, length: int, kv_cache: FakeCache) -> History:
        positions = np.arange(length)
        blocks = block_table[positions // kv_cache.block_size].astype(np.int64)
        assert (blocks >= 0).all()
        slots = blocks * kv_cache.block_size + positions % kv_cache.block_size
        tokens = kv_cache.token_ids[slots]
        assert (tokens >= 0).all(), "read a slot that nothing was written to"
        return tuple(tokens.tolist())


def check_rows(meta: AttentionMetadata, seen_by_row: list[History]) -> None:
    """Token, position and n-gram window of every row agree with the history in the cache."""
    assert meta.positions.tolist() == [len(seen) - 1 for seen in seen_by_row]
    assert meta.token_ids.tolist() == [seen[-1] for seen in seen_by_row]
    padded = [(-1,) * NGRAM_SIZE + seen for seen in seen_by_row]
    assert meta.ngram_token_ids.tolist() == [list(p[: -NGRAM_SIZE - 1 : -1]) for p in padded]


class FakeDecoder:
    """Bytes to complete characters."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._pieces[token_id])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeTokenizer:
    """Token id -> bytes; several tokens are parts of one character. Three special tokens."""

    stop_token_ids = frozenset({EOS, END})
    special_text = (b"<eos>", b"<pad>", b"<end>")

    def __init__(self, pieces: Iterable[bytes] | None = None) -> None:
        text = [b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", b"ab", b"ba", b" "]
        text += [bytes([c]) for c in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKL"]
        self.pieces = [b"", b"", b"", *(text if pieces is None else pieces)]

    def stream(self, *, skip_special_tokens: bool = True) -> FakeDecoder:
        if skip_special_tokens:
            return FakeDecoder(self.pieces)
        return FakeDecoder([*self.special_text, *self.pieces[3:]])

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


def make_engine(
    model: FakeModel | None = None, tokenizer: FakeTokenizer | None = None, **options: Any
) -> Engine:
    """An engine over the fakes with small blocks."""
    options = {"block_size": 4, "num_blocks": 64, "max_model_len": 128, **options}
    model = FakeModel() if model is None else model
    tokenizer = FakeTokenizer() if tokenizer is None else tokenizer
    return Engine(cast(Any, model), tokenizer, EngineConfig(**options))


@dataclass
class Result:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    error: str | None
    outputs: list[RequestOutput]


def collect(outputs: Iterable[RequestOutput]) -> dict[str, Result]:
    """Join outputs by request; no output may follow a final one."""
    results: dict[str, Result] = {}
    for output in outputs:
        result = results.setdefault(output.request_id, Result("", (), None, None, []))
        assert result.finish_reason is None, f"{output.request_id}: output after the final one"
        result.text += output.text
        result.token_ids += output.token_ids
        result.finish_reason, result.error = output.finish_reason, output.error
        result.outputs.append(output)
        assert output.num_generated_tokens == len(result.token_ids)
    return results


def run_all(
    engine: Engine, *, outputs: Sequence[RequestOutput] = (), max_steps: int = 2000
) -> dict[str, Result]:
    """Step until nothing is left; every request ended exactly once and every block is free.

    `outputs` are those of earlier steps.
    """
    outputs = list(outputs)
    for _ in range(max_steps):
        if not engine.has_work():
            break
        outputs += engine.step()
        engine._block_manager.check_invariants()
    assert not engine.has_work(), f"still working after {max_steps} steps"
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    results = collect(outputs)
    assert all(result.finish_reason is not None for result in results.values())
    return results


def naive_token(request: Request, logits: np.ndarray, stop_ids: Iterable[int]) -> int:
    """One token for one request, written out step by step in float32 as the sampler computes."""
    p, f32 = request.params, np.float32
    x = logits.copy()
    for token, bias in p.logit_bias:
        x[token] += f32(bias)
    if request.num_generated_tokens < p.min_tokens:
        x[list(stop_ids)] = -np.inf
    generated = request.token_ids[request.num_prompt_tokens :]
    repetition = f32(p.repetition_penalty)
    for token in set(request.token_ids) if p.has_penalties else ():
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        x[token] -= f32(p.frequency_penalty) * f32(generated.count(token))
        x[token] -= f32(p.presence_penalty) * f32(token in generated)
    if p.temperature == 0:
        return int(x.argmax())
    weights = naive_weights(torch.from_numpy((x - x.max()) / f32(p.temperature)), p)
    target = request.uniform() * sum(weights)
    total = 0.0
    for token, weight in enumerate(weights):
        total += weight
        if total > target:
            return token
    raise AssertionError("unreachable: the weights add up to more than the target")


def naive_weights(x: Tensor, params: SamplingParams) -> list[float]:
    """Unnormalised probabilities [v] of scores x [v] after min_p, top_k and top_p, no ties."""
    weights = x.exp().tolist()
    ordered = sorted(range(len(weights)), key=lambda i: -weights[i])
    ordered = [i for i in ordered if weights[i] >= params.min_p]
    if params.top_k:
        ordered = ordered[: params.top_k]
    total, mass, kept = sum(weights[i] for i in ordered), 0.0, set()
    for i in ordered:
        kept.add(i)
        mass += weights[i]
        if mass / total >= params.top_p:
            break
    return [w if i in kept else 0.0 for i, w in enumerate(weights)]


def naive_generate(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    max_model_len: int = 128,
    edit: Edit | None = None,
) -> tuple[tuple[int, ...], str]:
    """Tokens and finish_reason ("stop" or "length") of one seeded request without stop strings."""
    request = Request("naive", prompt, params)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS, END})
    while True:
        history = tuple(request.token_ids)
        logits = raw_logits(history) if edit is None else edit(history, raw_logits(history))
        token = naive_token(request, logits, stops)
        request.token_ids.append(token)
        generated = tuple(request.token_ids[request.num_prompt_tokens :])
        if token in stops and len(generated) > params.min_tokens:
            return generated, "stop"
        if len(generated) >= params.max_tokens or request.num_tokens >= max_model_len:
            return generated, "length"
