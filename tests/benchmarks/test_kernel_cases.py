"""The benchmark's calls are real calls: every builder runs, small, on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import model1.flash_mla as flash_mla
from benchmarks.cases import (
    MODEL1,
    V32,
    DecodeShape,
    cases,
    dense_decode,
    sparse_decode,
    sparse_prefill,
)
from benchmarks.kernel_inputs import block_tables, random_slots
from benchmarks.run import similarity_gap

CPU = torch.device("cpu")
TWO_SCOPES = DecodeShape(
    layout=MODEL1, h=2, topk=8, s_kv=40, page=16, extra_topk=24, extra_page=2, has_lengths=True
)
SHAPES = {
    "MODEL1": TWO_SCOPES,
    "one scope": dataclasses.replace(TWO_SCOPES, extra_topk=0, has_lengths=False),
    "V32": DecodeShape(layout=V32, h=3, topk=16, s_kv=40, page=64),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sparse_decode_calls_run_and_count_their_work(name: str) -> None:
    shape = SHAPES[name]
    work = sparse_decode(2, shape, CPU)
    out, lse = work.bind(flash_mla)()
    assert out.shape == (2, shape.s_q, shape.h, 512)
    assert out.isfinite().all()
    assert out.abs().sum() > 0
    assert lse.shape == (2, shape.h, shape.s_q)
    keys = work.flop / (2 * shape.h * (shape.layout.d + 512))
    assert 2 * shape.s_q * shape.topk <= keys
    assert keys <= 2 * shape.s_q * (shape.topk + shape.extra_topk)
    assert work.num_bytes > keys * 576


def test_prefill_and_dense_calls_run() -> None:
    out, largest, lse = sparse_prefill(512, 2, 8, 32, CPU, s_q=5).bind(flash_mla)()
    assert out.shape == (5, 2, 512)
    assert largest.shape == lse.shape == (5, 2)
    assert (largest <= lse).all()
    out, lse = dense_decode(2, 2, 3, 70, CPU).bind(flash_mla)()
    assert out.shape == (2, 2, 3, 512)
    assert lse.isfinite().all()


def test_slots_are_distinct_tokens_of_their_own_request() -> None:
    lengths = torch.tensor([5, 17], dtype=torch.int32)
    table, num_blocks = block_tables(lengths, 4)
    assert sorted(table.flatten().tolist()) == list(range(num_blocks))
    slots = random_slots(lengths, 3, 8, table, 4)
    for i, length in enumerate(lengths.tolist()):
        own = {int(table[i, j // 4]) * 4 + j % 4 for j in range(length)}
        for row in slots[i].tolist():
            used = [slot for slot in row if slot >= 0]
            assert len(set(used)) == len(used) == min(8, length)
            assert set(used) <= own
            assert row[len(used) :] == [-1] * (8 - len(used))


def test_every_case_has_its_own_name() -> None:
    names = [(case.operator, case.name) for case in cases()]
    assert len(set(names)) == len(names)


def test_similarity_gap_is_zero_only_for_equal_results() -> None:
    a = torch.randn(4, 5)
    assert similarity_gap(a, a) == pytest.approx(0.0, abs=1e-12)
    assert similarity_gap(a, 1.1 * a) > 1e-3
