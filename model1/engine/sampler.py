"""From logits to one token per request, vectorised over the requests of a step.

Every row is computed from its own logits and parameters alone, and random numbers are a function
of seed and token count, so a request's result does not depend on its batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model1.engine.request import Request, SamplingParams, TokenLogprob

# Candidates looked at before a full sort: top_p rarely keeps more, and sorting a row of 8k logits
# takes about 15 times as long as finding its largest 128 (one CPU core).
NUM_CANDIDATES = 128


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The choice for one row. `token_id` None: its logits were unusable, `error` says how."""

    token_id: int | None
    logprob: TokenLogprob | None = None
    error: str | None = None


@dataclass(slots=True)
class _History:
    """Token counts of one request that has penalties, kept up to date as it grows."""

    seen: Tensor  # [v] bool, prompt and generated
    counts: Tensor  # [v] float32, generated
    num_counted: int  # generated tokens in `counts`


class Sampler:
    """Chooses tokens. Holds only what can be rebuilt from the requests: their token counts.

    `stop_token_ids` are the tokenizer's; they cannot be drawn before min_tokens unless ignored.
    """

    def __init__(self, stop_token_ids: frozenset[int]) -> None:
        self._stop_token_ids = stop_token_ids
        self._histories: dict[str, _History] = {}

    def sample(self, requests: Sequence[Request], logits: Tensor) -> list[SampledToken]:
        """Choose the next token of each request from its row of logits [n, v] float32.

        A row that holds NaN or +inf, or in which no token is left, gives token_id None.
        Log-probabilities are those of the logits as given. Nothing is modified; sampling the
        same state twice gives the same result.
        """
        edited = [i for i, request in enumerate(requests) if self._needs_edit(request)]
        scores = self._edit(requests, logits, edited) if edited else logits
        best, token_ids = scores.max(dim=-1)
        usable = torch.isfinite(best)  # the maximum of a row with NaN is NaN
        if edited:
            usable &= torch.isfinite(logits.amax(dim=-1))  # an edit may have covered it up
        drawn = [i for i, request in enumerate(requests) if not request.params.is_greedy]
        if drawn:
            token_ids = self._draw_rows(requests, scores, best, token_ids, drawn)
        host_ids, is_usable = token_ids.tolist(), usable.tolist()
        logprobs = _logprobs(requests, logits, token_ids)
        return [
            SampledToken(host_ids[i], logprobs.get(i))
            if is_usable[i]
            else SampledToken(None, error="the model's logits hold NaN, +inf or no usable token")
            for i in range(len(requests))
        ]

    def forget(self, request_id: str) -> None:
        """Drop what is kept about a finished request; unknown ids are fine."""
        self._histories.pop(request_id, None)

    def _needs_edit(self, request: Request) -> bool:
        params = request.params
        return (
            params.has_penalties
            or bool(params.logit_bias)
            or request.num_generated_tokens < params.min_tokens
        )

    def _edit(self, requests: Sequence[Request], logits: Tensor, rows: list[int]) -> Tensor:
        """A copy of the logits with bias, min_tokens mask and penalties applied, in that order."""
        scores = logits.clone()
        for i in rows:
            params = requests[i].params
            if params.logit_bias:
                ids = torch.tensor([token for token, _ in params.logit_bias], device=logits.device)
                bias = torch.tensor([value for _, value in params.logit_bias], device=logits.device)
                scores[i, ids] += bias
            if requests[i].num_generated_tokens < params.min_tokens:
                stops = sorted(stop_ids(params, self._stop_token_ids))
                scores[i, torch.tensor(stops, device=logits.device, dtype=torch.int64)] = -torch.inf
        penalised = [i for i in rows if requests[i].params.has_penalties]
        if penalised:
            self._penalise(requests, scores, penalised)
        return scores

    def _penalise(self, requests: Sequence[Request], scores: Tensor, rows: list[int]) -> None:
        """In place: x / r if x > 0 else x * r for seen tokens, then x - f * count - p * [count>0].

        r, f, p: repetition, frequency and presence penalty.
        """
        histories = [self._history(requests[i], scores) for i in rows]
        counts = torch.stack([history.counts for history in histories])
        seen = torch.stack([history.seen for history in histories])
        params = [requests[i].params for i in rows]
        repetition = _column([p.repetition_penalty for p in params], scores)
        x = scores[rows]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x = x - _column([p.frequency_penalty for p in params], scores) * counts
        x = x - _column([p.presence_penalty for p in params], scores) * (counts > 0)
        scores[rows] = x

    def _history(self, request: Request, scores: Tensor) -> _History:
        history = self._histories.get(request.request_id)
        if history is None:
            seen = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            prompt = np.asarray(request.token_ids[: request.num_prompt_tokens], dtype=np.int64)
            seen[torch.from_numpy(prompt).to(scores.device)] = True
            history = _History(seen, torch.zeros_like(seen, dtype=torch.float32), 0)
            self._histories[request.request_id] = history
        for token_id in request.token_ids[request.num_prompt_tokens + history.num_counted :]:
            history.seen[token_id] = True
            history.counts[token_id] += 1.0
            history.num_counted += 1
        return history

    def _draw_rows(
        self,
        requests: Sequence[Request],
        scores: Tensor,
        best: Tensor,
        token_ids: Tensor,
        rows: list[int],
    ) -> Tensor:
        """`token_ids` [n] with the given rows replaced by random draws."""
        everything = len(rows) == len(requests)
        params = [requests[i].params for i in rows]
        x = scores if everything else scores[rows]
        x = x - (best if everything else best[rows]).unsqueeze(1)  # maximum 0: no overflow below
        x = x / _column([p.temperature for p in params], scores)
        uniform = [requests[i].uniform() for i in rows]
        drawn = draw(filter_scores(x, params), uniform)
        if everything:
            return drawn
        token_ids = token_ids.clone()
        token_ids[rows] = drawn
        return token_ids


def stop_ids(params: SamplingParams, tokenizer_stop_ids: frozenset[int]) -> frozenset[int]:
    """Tokens that end a request: its own and, unless ignored, the tokenizer's."""
    own = frozenset(params.stop_token_ids)
    return own if params.ignore_eos else own | tokenizer_stop_ids


def filter_scores(x: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Set scores outside min_p, top_k and top_p to -inf; x [n, v] float32, row maxima 0.

    Each filter is a threshold on the score, so tokens tied with the last one kept stay too:
        min_p   x >= ln(min_p)
        top_k   x >= k-th largest of what is left
        top_p   x >= smallest of the fewest largest whose share of what is left reaches top_p
    """
    vocab_size = x.shape[1]
    min_p = [p.min_p for p in params]
    if any(min_p):
        x = x.masked_fill(x < _column(min_p, x).log(), -torch.inf)  # ln 0 = -inf keeps all
    top_k = [p.top_k if 0 < p.top_k < vocab_size else 0 for p in params]
    has_top_p = any(p.top_p < 1.0 for p in params)
    if not any(top_k) and not has_top_p:
        return x
    num_candidates = min(vocab_size, max(NUM_CANDIDATES if has_top_p else 1, *top_k))
    candidates = x.topk(num_candidates, dim=-1).values  # [n, num_candidates], descending
    if any(top_k):
        kth = candidates.gather(1, _column(top_k, x, torch.int64).sub(1).clamp_min(0))
        kth = kth.masked_fill(_column(top_k, x, torch.int64) == 0, -torch.inf)
        x = x.masked_fill(x < kth, -torch.inf)
        candidates = candidates.masked_fill(candidates < kth, -torch.inf)
    return _keep_top_p(x, candidates, params) if has_top_p else x


def _keep_top_p(x: Tensor, candidates: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    # A row whose candidates do not reach its top_p is sorted in full, by itself: the path taken
    # depends on no other row.
    top_p = _column([p.top_p for p in params], x, torch.float64)
    total = x.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    threshold, reached = _top_p_threshold(candidates, total, top_p)
    active = top_p.squeeze(1) < 1.0
    missing = (active & ~reached).nonzero().squeeze(1)
    if missing.numel():
        ordered = x[missing].sort(dim=-1, descending=True).values
        threshold[missing], _ = _top_p_threshold(ordered, total[missing], top_p[missing])
    threshold = threshold.masked_fill(~active.unsqueeze(1), -torch.inf)
    return x.masked_fill(x < threshold, -torch.inf)


def _top_p_threshold(ordered: Tensor, total: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest kept score [n, 1], and whether the given scores [n, m] reach top_p [n] bool."""
    cumulative = ordered.exp().cumsum(dim=-1, dtype=torch.float64) / total
    below = (cumulative < top_p).sum(dim=-1, keepdim=True)  # entries that do not suffice
    last = ordered.shape[1] - 1
    return ordered.gather(1, below.clamp_max(last)), (below <= last).squeeze(1)


def draw(x: Tensor, uniform: Sequence[float]) -> Tensor:
    """Inverse-CDF draw from softmax(x) per row: first token whose cumulative weight exceeds u.

    x [n, v] float32 with row maxima 0; uniform: n numbers in [0, 1) of at most 48 bits. A token of
    weight 0 is never drawn. A row with NaN gives an arbitrary token.
    """
    cumulative = x.exp().cumsum(dim=-1, dtype=torch.float64)
    target = _column(uniform, x, torch.float64) * cumulative[:, -1:]
    token_ids = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return token_ids.clamp_max(x.shape[1] - 1)


def _logprobs(
    requests: Sequence[Request], logits: Tensor, token_ids: Tensor
) -> dict[int, TokenLogprob]:
    rows = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return {}
    wanted = [requests[i].params.logprobs or 0 for i in rows]
    values = torch.log_softmax(logits[rows], dim=-1)
    chosen_ids = token_ids[rows]
    chosen = values.gather(1, chosen_ids.unsqueeze(1)).squeeze(1).tolist()
    top, top_ids = values.topk(min(max(wanted), values.shape[1]), dim=-1)
    pairs = [
        tuple(zip(ids, vals, strict=True))[:n]
        for ids, vals, n in zip(top_ids.tolist(), top.tolist(), wanted, strict=True)
    ]
    ids = chosen_ids.tolist()
    return {i: TokenLogprob(ids[j], chosen[j], pairs[j]) for j, i in enumerate(rows)}


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device).unsqueeze(1)
