"""Which requests run in the next step, and how many tokens of each.

First come, first served. Running requests are always older than waiting ones: a preempted request
is the newest running one and goes back to the front of the queue. So the oldest request can take
every block it needs from younger ones and always progresses, and since requests that could never
fit are refused on entry, every request finishes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from model1.cache.block_manager import BlockManager
from model1.engine.request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's part of a step: tokens num_computed_tokens .. + num_new_tokens of it."""

    request: Request
    num_new_tokens: int
    block_table: list[int]

    @property
    def needs_logits(self) -> bool:
        """The step reaches the request's last token, so its next token can be chosen."""
        return self.request.num_computed_tokens + self.num_new_tokens == self.request.num_tokens


class Scheduler:
    """Queues, token budget and preemption; owns the requests' blocks through the block manager.

    A waiting request is admitted only with budget left over, so at most the newest running one is
    still in prefill; with max_num_batched_tokens >= max_num_seqs, which EngineConfig ensures, every
    running request has its part in every step.
    """

    def __init__(
        self, block_manager: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a new request behind all others."""
        self.waiting.append(request)

    def has_work(self) -> bool:
        """Some request is running or waiting."""
        return bool(self.running or self.waiting)

    def schedule(self) -> list[ScheduledRequest]:
        """Plan one step and reserve its blocks.

        Running requests come first, oldest first: one token each when decoding, as much of the
        prompt as the budget allows when still in prefill. Then waiting requests are admitted
        while there are seats, budget and blocks for all of their tokens. Empty without work.
        """
        budget = self.max_num_batched_tokens
        step: list[ScheduledRequest] = []
        for request in list(self.running):
            if request.status is not RequestStatus.RUNNING:
                break  # preempted: so are all younger ones
            if self._make_room(request):
                step.append(self._plan(request, budget))
                budget -= step[-1].num_new_tokens
        while budget > 0 and self._can_admit():
            request = self.waiting.popleft()
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            step.append(self._plan(request, budget))
            budget -= step[-1].num_new_tokens
        return step

    def commit(self, step: list[ScheduledRequest]) -> None:
        """Record that the step's tokens are now in the cache."""
        for part in step:
            part.request.num_computed_tokens += part.num_new_tokens

    def finish(self, request: Request) -> None:
        """Remove a request in any state and free its blocks."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self.block_manager.free(request.request_id)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED

    def _plan(self, request: Request, budget: int) -> ScheduledRequest:
        num_new_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
        # All of a prefill's blocks are taken at admission: a later chunk can then never fail.
        block_table = self.block_manager.ensure(request.request_id, request.num_tokens)
        return ScheduledRequest(request, num_new_tokens, block_table)

    def _make_room(self, request: Request) -> bool:
        """Preempt the newest until the running `request` fits; False if that was itself."""
        while not self.block_manager.can_allocate(request.num_tokens, request.request_id):
            newest = self.running[-1]
            self._preempt(newest)
            if newest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Drop the cache of the newest running request; it is recomputed from its tokens later."""
        self.running.remove(request)
        self.block_manager.free(request.request_id)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _can_admit(self) -> bool:
        """There is a seat, and blocks for all tokens of the next request.

        A request preempted in this step does not come back in it: it needs at least the blocks it
        gave up, and an older request has taken one of them.
        """
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return False
        return self.block_manager.can_allocate(self.waiting[0].num_tokens)
