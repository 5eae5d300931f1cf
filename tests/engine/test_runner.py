from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model1.engine.request import Request, SamplingParams
from model1.engine.runner import build_metadata
from model1.engine.scheduler import ScheduledRequest
from model1.nn.metadata import AttentionMetadata

CPU = torch.device("cpu")


def part(
    tokens: list[int], num_computed: int, num_new: int, block_table: list[int]
) -> ScheduledRequest:
    request = Request("r", tokens, SamplingParams(), num_computed_tokens=num_computed)
    return ScheduledRequest(request, num_new, block_table)


def test_a_mixed_step_by_hand() -> None:
    step = [
        part([10, 11, 12, 13, 14], 4, 1, [7, 2, 9]),  # decode
        part([20, 21, 22, 23, 24, 25], 1, 3, [0, 1]),  # middle of a prefill
        part([30, 31], 0, 2, [5]),  # whole prefill
    ]
    meta = build_metadata(step, block_size=2, ngram_size=3, device=CPU)
    assert meta.token_ids.tolist() == [14, 21, 22, 23, 30, 31]
    assert meta.positions.tolist() == [4, 1, 2, 3, 0, 1]
    assert meta.ngram_token_ids.tolist() == [
        [14, 13, 12],
        [21, 20, -1],
        [22, 21, 20],
        [23, 22, 21],
        [30, -1, -1],
        [31, 30, -1],
    ]
    assert meta.slot_mapping.tolist() == [18, 1, 2, 3, 10, 11]
    assert meta.block_table.tolist() == [[7, 2, 9], [0, 1, -1], [5, -1, -1]]
    assert meta.query_lens == (1, 3, 2)
    assert meta.cache_seqlens == (5, 4, 2)
    assert meta.logits_rows.tolist() == [0, 5]
    longs = (meta.token_ids, meta.positions, meta.ngram_token_ids, meta.slot_mapping)
    assert {t.dtype for t in (*longs, meta.logits_rows)} == {torch.int64}
    assert meta.block_table.dtype == torch.int32
    assert all(t.is_contiguous() for t in longs)


def test_without_memory_the_window_is_the_token_and_no_logits_may_be_wanted() -> None:
    step = [part([1, 2, 3], 0, 2, [0])]
    meta = build_metadata(step, block_size=4, ngram_size=1, device=CPU)
    assert meta.ngram_token_ids.tolist() == [[1], [2]]
    assert meta.logits_rows.shape == (0,)
    assert meta.logits_rows.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 30),
    cuts=st.sets(st.integers(1, 29), max_size=6),
    ngram_size=st.integers(1, 5),
)
def test_any_split_of_a_prefill_gives_the_same_rows(
    length: int, cuts: set[int], ngram_size: int
) -> None:
    tokens, table = list(range(100, 100 + length)), [3, 0, 6, 1, 8, 2, 5, 4]

    def build(start: int, end: int) -> AttentionMetadata:
        step = [part([1, 2], 1, 1, [7]), part(tokens, start, end - start, table)]
        return build_metadata(step, block_size=4, ngram_size=ngram_size, device=CPU)

    whole = build(0, length)
    edges = [0, *sorted(c for c in cuts if c < length), length]
    pieces = [build(a, b) for a, b in itertools.pairwise(edges)]
    for name in ("token_ids", "positions", "ngram_token_ids", "slot_mapping"):
        joined = torch.cat([getattr(piece, name)[1:] for piece in pieces])
        assert torch.equal(joined, getattr(whole, name)[1:]), name
