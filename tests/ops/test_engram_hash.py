"""The Engram hash and its constants against published numbers and plain Python integers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from engram_cases import LARGE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.config import EngramConfig
from model1.errors import ConfigError
from model1.ops.engram import HashSpec, build_hash_specs, check_compression_table, engram_hash

# The paper's demonstration: five times a vocabulary of 129,280.
DEMO = dataclasses.replace(
    LARGE, engram_layer_ids=(1, 15), engram_max_ngram_size=3, engram_vocab_size=5 * 129_280
)


def tensors(spec: HashSpec) -> tuple[Tensor, Tensor, Tensor]:
    arrays = (spec.multipliers, spec.table_sizes, spec.table_offsets)
    return tuple(torch.from_numpy(array) for array in arrays)  # type: ignore[return-value]


def naive_rows(ids: list[int], table: list[int], spec: HashSpec, pad: int) -> list[int]:
    """One token in unbounded Python integers, walking back place by place."""
    num_heads = len(spec.table_sizes) // (len(ids) - 1)
    rows, mix, alive = [], 0, True
    for place, token_id in enumerate(ids):
        alive = alive and token_id >= 0
        product = table[token_id if alive else pad] * int(spec.multipliers[place])
        assert product < 2**63
        mix ^= product
        for head in range(num_heads if place else 0):
            column = (place - 1) * num_heads + head
            rows.append(mix % int(spec.table_sizes[column]) + int(spec.table_offsets[column]))
    return rows


def is_prime_by_division(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def test_golden_multipliers() -> None:
    specs = build_hash_specs(LARGE)
    assert specs[1].multipliers.tolist() == [
        76632096046245,
        4839876093313,
        35959672319349,
        73987337458391,
    ]
    assert specs[14].multipliers.tolist() == [
        67716810739261,
        51510806800915,
        30921347202721,
        82619226485591,
    ]


def test_golden_primes_and_row_counts() -> None:
    specs = build_hash_specs(LARGE)
    ends = [(int(s.table_sizes[0]), int(s.table_sizes[-1])) for s in specs.values()]
    assert ends == [(16_000_057, 16_000_463), (16_000_477, 16_000_889)]
    assert [s.num_rows for s in specs.values()] == [384_006_168, 384_016_682]


def test_golden_demo_primes() -> None:
    specs = build_hash_specs(DEMO)
    assert list(specs) == [1, 15]
    assert [s.num_rows for s in specs.values()] == [10_344_164, 10_348_242]
    assert specs[1].table_sizes[0] == 646_403
    assert specs[15].table_sizes[-1] == 646_879


def test_golden_rows() -> None:
    """Frozen: a change here makes every trained table useless."""
    ids = torch.tensor([[7, 5, 3, 2], [0, 0, 0, 0], [99_091, 99_091, 99_091, 99_091]])
    spec = build_hash_specs(LARGE)[1]
    rows = engram_hash(ids, torch.arange(99_092), *tensors(spec), pad_token_id=2)
    assert rows[1].tolist() == spec.table_offsets.tolist()
    assert rows[0, [0, 8, 23]].tolist() == [1_465_117, 130_348_112, 382_554_457]
    assert rows[2, [0, 8, 23]].tolist() == [12_193_612, 132_502_226, 375_130_424]


@given(
    base=st.integers(1, 3000),
    num_orders=st.integers(1, 4),
    num_heads=st.integers(1, 5),
    num_layers=st.integers(1, 3),
)
@settings(max_examples=30, deadline=None)
def test_table_sizes_are_the_next_unused_primes(
    base: int, num_orders: int, num_heads: int, num_layers: int
) -> None:
    config = dataclasses.replace(
        LARGE,
        engram_layer_ids=tuple(range(num_layers)),
        engram_max_ngram_size=num_orders + 1,
        engram_n_heads=num_heads,
        engram_vocab_size=base,
    )
    specs = build_hash_specs(config)
    found = [size for spec in specs.values() for size in spec.table_sizes.tolist()]
    candidate, expected = base, []
    while len(expected) < num_orders * num_heads * num_layers:
        if is_prime_by_division(candidate):
            expected.append(candidate)
        candidate += 1
    assert found == expected
    for spec in specs.values():
        sizes = spec.table_sizes.tolist()
        assert spec.table_offsets.tolist() == [sum(sizes[:i]) for i in range(len(sizes))]


def test_strong_pseudoprimes_are_rejected() -> None:
    # Composites that pass Miller-Rabin for the first 4, 7 and 11 prime bases.
    for composite in (3_215_031_751, 341_550_071_728_321, 3_825_123_056_546_413_051):
        config = dataclasses.replace(
            LARGE, engram_vocab_size=composite, engram_max_ngram_size=2, engram_n_heads=1
        )
        config = dataclasses.replace(config, engram_layer_ids=(0,))
        assert build_hash_specs(config)[0].table_sizes[0] > composite


@pytest.mark.parametrize("size", [1, 2, 99_092, 2**31, 2**62, 2**63 - 1])
def test_multipliers_are_odd_and_never_overflow(size: int) -> None:
    config = dataclasses.replace(LARGE, engram_compressed_vocab_size=size)
    for spec in build_hash_specs(config).values():
        assert (spec.multipliers > 0).all()
        assert (spec.multipliers % 2 == 1).all()
        assert all(int(m) * (size - 1) < 2**63 for m in spec.multipliers)


def test_bad_constants_are_named() -> None:
    with pytest.raises(ConfigError, match="engram_seed must not be negative, got -1"):
        build_hash_specs(dataclasses.replace(LARGE, engram_seed=-1))
    with pytest.raises(ConfigError, match=r"below 2\^63, got 4611686018427387904"):
        build_hash_specs(dataclasses.replace(LARGE, engram_vocab_size=2**62))


def test_compression_table_must_be_the_one_of_the_config() -> None:
    config = dataclasses.replace(LARGE, engram_compressed_vocab_size=3)
    check_compression_table(np.array([0, 1, 1, 2, 0]), config)
    for wrong in ([0, 1, 1], [0, 1, 2, 3], [0, 2, 2], []):
        with pytest.raises(ConfigError, match="engram_compressed_vocab_size is 3"):
            check_compression_table(np.array(wrong, dtype=np.int64), config)
    with pytest.raises(ConfigError, match=r"engram_pad_token_id must be below .* 3, got 9"):
        check_compression_table(
            np.array([0, 1, 2]), dataclasses.replace(config, engram_pad_token_id=9)
        )


@st.composite
def hash_cases(draw: st.DrawFn) -> tuple[list[list[int]], list[int], EngramConfig]:
    vocab_size = draw(st.integers(1, 60))
    num_places = draw(st.integers(2, 5))
    config = dataclasses.replace(
        LARGE,
        engram_layer_ids=(draw(st.integers(0, 40)),),
        engram_max_ngram_size=num_places,
        engram_n_heads=draw(st.integers(1, 4)),
        engram_vocab_size=draw(st.integers(1, 10**7)),
        engram_compressed_vocab_size=draw(st.integers(vocab_size, 2**40)),
        engram_pad_token_id=draw(st.integers(0, vocab_size - 1)),
        engram_seed=draw(st.integers(0, 2**31)),
    )
    largest = config.engram_compressed_vocab_size - 1
    table = draw(st.lists(st.integers(0, largest), min_size=vocab_size, max_size=vocab_size))
    window = st.lists(st.integers(-2, vocab_size - 1), min_size=num_places, max_size=num_places)
    return draw(st.lists(window, max_size=6)), table, config


@given(case=hash_cases())
@settings(max_examples=150, deadline=None)
def test_hash_equals_plain_integers(
    case: tuple[list[list[int]], list[int], EngramConfig],
) -> None:
    windows, table, config = case
    (spec,) = build_hash_specs(config).values()
    ids = torch.tensor(windows, dtype=torch.int64).view(-1, config.engram_max_ngram_size)
    pad = config.engram_pad_token_id
    rows = engram_hash(ids, torch.tensor(table), *tensors(spec), pad_token_id=pad)
    assert rows.dtype == torch.int64
    assert rows.shape == (len(windows), config.num_tables)
    assert rows.tolist() == [naive_rows(ids, table, spec, pad) for ids in windows]
    assert ((rows >= 0) & (rows < spec.num_rows)).all()


def test_a_gap_is_latched() -> None:
    """Nothing behind a gap counts, not even ids that are there."""
    spec = build_hash_specs(LARGE)[1]
    table = torch.arange(99_092)
    windows = torch.tensor([[5, 6, -1, 7], [5, 6, 2, 2], [5, 6, 2, 7], [-1, 5, 6, 7], [2, 2, 2, 2]])
    rows = engram_hash(windows, table, *tensors(spec), pad_token_id=2)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert torch.equal(rows[3], rows[4])


def test_permuted_and_split_tokens_hash_alike() -> None:
    spec = build_hash_specs(DEMO)[1]
    ids, table = torch.randint(-1, 500, (33, 3)), torch.randint(0, 99_092, (500,))
    rows = engram_hash(ids, table, *tensors(spec), pad_token_id=2)
    order = torch.randperm(33)
    assert torch.equal(engram_hash(ids[order], table, *tensors(spec), pad_token_id=2), rows[order])
    strided = ids.t().contiguous().t()
    assert torch.equal(engram_hash(strided, table, *tensors(spec), pad_token_id=2), rows)
    single = [engram_hash(ids[i : i + 1], table, *tensors(spec), pad_token_id=2) for i in range(33)]
    assert torch.equal(torch.cat(single), rows)


def test_hash_traces_without_a_graph_break() -> None:
    spec = build_hash_specs(DEMO)[1]
    table = torch.randint(0, 99_092, (500,))
    compiled = torch.compile(engram_hash, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_tokens in (2, 9):
        ids = torch.randint(-1, 500, (num_tokens, 3))
        expected = engram_hash(ids, table, *tensors(spec), pad_token_id=2)
        assert torch.equal(compiled(ids, table, *tensors(spec), pad_token_id=2), expected)


def test_bad_hash_input_is_named() -> None:
    spec = build_hash_specs(DEMO)[1]
    multipliers, sizes, offsets = tensors(spec)
    ids, table = torch.zeros(2, 3, dtype=torch.int64), torch.arange(10)
    with pytest.raises(ValueError, match="ngram_token_ids must be int64 with 2 axes"):
        engram_hash(ids.int(), table, multipliers, sizes, offsets, pad_token_id=0)
    with pytest.raises(ValueError, match="compression_table must be int64 with 1 axes"):
        engram_hash(ids, table.view(2, 5), multipliers, sizes, offsets, pad_token_id=0)
    with pytest.raises(ValueError, match="at least 2 columns, got 1"):
        engram_hash(ids[:, :1], table, multipliers, sizes, offsets, pad_token_id=0)
    with pytest.raises(ValueError, match=r"multipliers must have shape \(3,\), got \(2,\)"):
        engram_hash(ids, table, multipliers[:2], sizes, offsets, pad_token_id=0)
    with pytest.raises(ValueError, match="multiple of the 2 orders long, got 15"):
        engram_hash(ids, table, multipliers, sizes[:15], offsets[:15], pad_token_id=0)
    with pytest.raises(ValueError, match=r"table_offsets must have shape \(16,\)"):
        engram_hash(ids, table, multipliers, sizes, offsets[:15], pad_token_id=0)
    with pytest.raises(ValueError, match="pad_token_id must not be negative, got -1"):
        engram_hash(ids, table, multipliers, sizes, offsets, pad_token_id=-1)
    with pytest.raises(IndexError):
        engram_hash(ids + 10, table, multipliers, sizes, offsets, pad_token_id=0)
