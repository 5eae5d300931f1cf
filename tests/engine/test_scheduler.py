from __future__ import annotations

import subprocess
import sys

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model1.cache.block_manager import BlockManager
from model1.engine.request import Request, RequestStatus, SamplingParams
from model1.engine.scheduler import ScheduledRequest, Scheduler

NUM_BLOCKS, BLOCK_SIZE, MAX_SEQS, BUDGET = 7, 4, 3, 9
MAX_LEN = NUM_BLOCKS * BLOCK_SIZE


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are aborted and end in any order; the books always balance."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=MAX_SEQS, max_num_batched_tokens=BUDGET
        )
        self.alive: list[Request] = []
        self.num_added = 0

    @rule(num_prompt_tokens=st.integers(1, MAX_LEN))
    def add(self, num_prompt_tokens: int) -> None:
        request = Request(str(self.num_added), [0] * num_prompt_tokens, SamplingParams())
        self.num_added += 1
        self.scheduler.add(request)
        self.alive.append(request)

    @rule()
    def step(self) -> None:
        step = self.scheduler.schedule()
        self.check_step(step)
        done = [part.request for part in step if part.needs_logits]
        self.scheduler.commit(step)
        for request in done:
            request.token_ids.append(0)
            if request.num_tokens > MAX_LEN:
                self.end(request)

    @rule(index=st.integers(0, 50))
    @precondition(lambda self: self.alive)
    def abort(self, index: int) -> None:
        self.end(self.alive[index % len(self.alive)])

    @rule()
    def finish_all(self) -> None:
        for _ in range(MAX_LEN * (len(self.alive) + 1)):
            self.step()
            if not self.alive:
                break
        assert not self.alive
        assert not self.scheduler.has_work()
        assert self.blocks.num_free_blocks == NUM_BLOCKS

    def end(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.alive.remove(request)

    def check_step(self, step: list[ScheduledRequest]) -> None:
        assert [part.request for part in step] == self.scheduler.running
        assert sum(part.num_new_tokens for part in step) <= BUDGET
        assert len(step) <= MAX_SEQS
        if self.alive:
            assert step[0].request is self.alive[0], "the oldest request must progress"
        for part in step:
            assert part.num_new_tokens >= 1
            end = part.request.num_computed_tokens + part.num_new_tokens
            assert len(part.block_table) * BLOCK_SIZE >= end
            assert part.block_table == self.blocks.block_table(part.request.request_id)

    @invariant()
    def books_balance(self) -> None:
        self.blocks.check_invariants()
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert running + waiting == self.alive, "first come, first served"
        assert all(r.status is RequestStatus.RUNNING for r in running)
        assert all(r.status is RequestStatus.WAITING for r in waiting)
        assert all(r.num_computed_tokens == 0 for r in waiting)
        assert list(self.blocks.request_ids) == [r.request_id for r in running]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def make(num_blocks: int, *lengths: int) -> tuple[Scheduler, list[Request]]:
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE), max_num_seqs=8, max_num_batched_tokens=100
    )
    requests = [Request(str(i), [0] * n, SamplingParams()) for i, n in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def advance(scheduler: Scheduler) -> list[str]:
    step = scheduler.schedule()
    scheduler.commit(step)
    for part in step:
        part.request.token_ids.append(0)
    return [part.request.request_id for part in step]


def test_a_large_request_is_not_overtaken_by_a_small_one() -> None:
    scheduler, requests = make(4, 8, 12, 1)
    assert advance(scheduler) == ["0"]
    assert [r.request_id for r in scheduler.waiting] == ["1", "2"]
    scheduler.finish(requests[0])
    assert advance(scheduler) == ["1", "2"]


def test_the_newest_is_preempted_and_comes_back_before_later_arrivals() -> None:
    scheduler, requests = make(4, 8, 8)
    assert advance(scheduler) == ["0", "1"]
    scheduler.add(Request("2", [0], SamplingParams()))
    assert advance(scheduler) == ["0"]  # both need a third block
    assert [r.request_id for r in scheduler.waiting] == ["1", "2"]
    assert (requests[1].num_preemptions, scheduler.num_preemptions) == (1, 1)
    scheduler.finish(requests[0])
    step = scheduler.schedule()
    assert [(p.request.request_id, p.num_new_tokens) for p in step] == [("1", 9), ("2", 1)]


def test_scheduling_imports_no_torch() -> None:
    code = "import model1.engine.scheduler, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
