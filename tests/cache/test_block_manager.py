"""The block manager against a model of it: no leak, no double free, no overlap."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model1.cache import BlockManager, OutOfBlocks

REQUESTS = st.sampled_from("abcde")
TOKENS = st.integers(0, 40)


class BlockManagerMachine(RuleBasedStateMachine):
    """Random requests grow, are refused and leave; `tables` is what each must still hold."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 7))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.tables: dict[str, list[int]] = {}

    @rule(request_id=REQUESTS, num_tokens=TOKENS)
    def ensure(self, request_id: str, num_tokens: int) -> None:
        before = self.tables.get(request_id, [])
        needed = -(-num_tokens // self.manager.block_size)
        fits = needed - len(before) <= self.manager.num_free_blocks
        assert self.manager.can_allocate(num_tokens, request_id) == fits
        if not fits:
            with pytest.raises(OutOfBlocks):
                self.manager.ensure(request_id, num_tokens)
            return
        table = self.manager.ensure(request_id, num_tokens)
        assert table[: len(before)] == before
        assert len(table) == max(needed, len(before))
        self.tables[request_id] = table

    @rule(num_tokens=TOKENS)
    def ask_for_a_new_request(self, num_tokens: int) -> None:
        needed = -(-num_tokens // self.manager.block_size)
        assert self.manager.can_allocate(num_tokens) == (needed <= self.manager.num_free_blocks)

    @rule(request_id=REQUESTS)
    def free(self, request_id: str) -> None:
        if request_id in self.tables:
            self.manager.free(request_id)
            del self.tables[request_id]
        with pytest.raises(ValueError, match="unknown or already freed"):
            self.manager.free(request_id)

    @precondition(lambda self: self.tables)
    @rule()
    def spoil_the_returned_lists(self) -> None:
        for request_id, table in self.tables.items():
            self.manager.block_table(request_id).append(-7)
            assert self.manager.block_table(request_id) == table

    @invariant()
    def nothing_leaks_or_overlaps(self) -> None:
        self.manager.check_invariants()
        owned = [block_id for table in self.tables.values() for block_id in table]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(self.manager.num_blocks))
        assert self.manager.num_free_blocks == self.manager.num_blocks - len(owned)
        assert set(self.manager.request_ids) == set(self.tables)
        for request_id, table in self.tables.items():
            assert self.manager.block_table(request_id) == table


BlockManagerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestBlockManager = BlockManagerMachine.TestCase


def test_blocks_are_handed_out_in_order_and_the_last_freed_first() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    assert manager.ensure("a", 3) == [0, 1]
    assert manager.ensure("b", 2) == [2]
    manager.free("a")
    assert manager.ensure("c", 6) == [0, 1, 3]


def test_a_refused_request_holds_nothing() -> None:
    manager = BlockManager(num_blocks=2, block_size=4)
    with pytest.raises(OutOfBlocks, match="'a' needs 3 more blocks for 9 tokens, 2 of 2 are free"):
        manager.ensure("a", 9)
    with pytest.raises(ValueError, match="'a' holds no blocks"):
        manager.block_table("a")
    assert manager.ensure("a", 8) == [0, 1]
    with pytest.raises(OutOfBlocks):
        manager.ensure("a", 9)
    assert manager.block_table("a") == [0, 1]


def test_no_tokens_need_no_block_and_fewer_tokens_change_nothing() -> None:
    manager = BlockManager(num_blocks=2, block_size=4)
    assert manager.ensure("a", 0) == []
    assert manager.ensure("a", 5) == [0, 1]
    assert manager.ensure("a", 1) == [0, 1]
    manager.free("a")
    assert manager.num_free_blocks == 2


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 1), (1, 0), (-3, 1)])
def test_sizes_must_be_positive(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=r"must be positive, got (0|-3)"):
        BlockManager(num_blocks, block_size)


def test_negative_token_counts_are_refused() -> None:
    manager = BlockManager(num_blocks=1, block_size=1)
    for call in (manager.can_allocate, lambda tokens: manager.ensure("a", tokens)):
        with pytest.raises(ValueError, match="num_tokens must not be negative, got -1"):
            call(-1)


@pytest.mark.parametrize("free", [[0, 2, 3], [2], [2, 2, 3], [2, 4]], ids=str)
def test_invariants_catch_overlap_leak_double_free_and_strangers(free: list[int]) -> None:
    manager = BlockManager(num_blocks=4, block_size=1)
    manager.ensure("a", 2)
    manager.check_invariants()
    manager._free = free
    with pytest.raises(AssertionError, match="free or owned once"):
        manager.check_invariants()
