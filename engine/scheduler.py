"""Decides what each step computes: which requests, how many tokens of each, whose blocks.

First come, first served. Decodes go first, so that running requests never wait for a prompt; what
is left of the token budget goes to prefill chunks. When blocks run out, the request that came last
is preempted: its blocks are freed and its tokens are computed again later. Plain Python, no torch.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.errors import ConfigError
from engine.kv_blocks import BlockPool
from engine.request import Request, RequestState


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step.

    Args:
        max_num_seqs: Most requests that run at once.
        max_num_batched_tokens: Most tokens of one step; longer prompts are prefilled in chunks.

    Raises:
        ConfigError: A limit is below 1, or there is no room for one token of every request.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), "
                f"got {self.max_num_batched_tokens}"
            )


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's share of a step: tokens `start` to `start + num_tokens` go through the model."""

    request: Request
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """Tokens in the KV cache after the step."""
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the step ends with a new token for this request (not so for inner chunks)."""
        return self.end == self.request.num_tokens


@dataclass(slots=True)
class StepPlan:
    """What one step computes; decodes come before prefills in the batch."""

    decodes: list[ScheduledRequest] = field(default_factory=list)
    prefills: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def scheduled(self) -> list[ScheduledRequest]:
        """All shares in batch order."""
        return self.decodes + self.prefills

    @property
    def sampling(self) -> list[ScheduledRequest]:
        """The shares that end with a new token, in batch order."""
        return [item for item in self.scheduled if item.samples]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.decodes) + sum(item.num_tokens for item in self.prefills)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decodes and not self.prefills


class Scheduler:
    """Forms steps from waiting and running requests.

    Args:
        config: Limits of one step.
        pool: The block accounting of the device pool.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet, or no longer."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request behind all others."""
        self._waiting.append(request)

    def requests(self) -> Iterable[Request]:
        """Return every unfinished request, running ones first."""
        return [*self._running, *self._waiting]

    def plan_step(self) -> StepPlan:
        """Choose what the next step computes and reserve its blocks."""
        plan = StepPlan()
        budget = self.config.max_num_batched_tokens
        budget -= self._plan_decodes(plan)
        budget -= self._plan_running_prefills(plan, budget)
        if not plan.preempted:
            self._admit(plan, budget)
        return plan

    def _plan_decodes(self, plan: StepPlan) -> int:
        for request in [r for r in self._running if r.num_uncomputed_tokens == 1]:
            if request.state is not RequestState.RUNNING:
                continue  # preempted for an earlier one, in this very loop
            if self._reserve_or_preempt(request, plan):
                plan.decodes.append(ScheduledRequest(request, request.num_computed_tokens, 1))
        return len(plan.decodes)

    def _reserve_or_preempt(self, request: Request, plan: StepPlan) -> bool:
        """Reserve the blocks of a running request; preempt from the back while they are missing."""
        while not self.pool.can_hold(request.request_id, request.num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            plan.preempted.append(victim)
            if victim is request:
                return False
        self.pool.grow(request.request_id, request.num_tokens)
        return True

    def _plan_running_prefills(self, plan: StepPlan, budget: int) -> int:
        used = 0
        for request in self._running:
            if request.num_uncomputed_tokens > 1 and used < budget:
                used += self._plan_chunk(request, plan, budget - used)
        return used

    def _plan_chunk(self, request: Request, plan: StepPlan, budget: int) -> int:
        num_tokens = min(request.num_uncomputed_tokens, budget)
        plan.prefills.append(ScheduledRequest(request, request.num_computed_tokens, num_tokens))
        return num_tokens

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting requests in order; the first that does not fit holds back the others.

        All blocks of a request's known tokens are reserved at once, so that a prompt that was
        begun can be finished.
        """
        while self._waiting and budget > 0 and len(self._running) < self.config.max_num_seqs:
            request = self._waiting[0]
            if not self.pool.can_hold(request.request_id, request.num_tokens):
                return
            self._waiting.popleft()
            self.pool.grow(request.request_id, request.num_tokens)
            request.state = RequestState.RUNNING
            if request.first_scheduled_time_s is None:
                request.first_scheduled_time_s = time.monotonic()
            self._running.append(request)
            budget -= self._plan_chunk(request, plan, budget)

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self.pool.free(request.request_id)
        request.state = RequestState.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._waiting.appendleft(request)

    def complete_step(self, plan: StepPlan, token_ids: Sequence[int]) -> None:
        """Record what a step computed.

        Args:
            plan: The step.
            token_ids: The new tokens of `plan.sampling`.
        """
        sampling = plan.sampling
        for item in plan.scheduled:
            item.request.num_computed_tokens = item.end
        for item, token_id in zip(sampling, token_ids, strict=True):
            request = item.request
            if request.is_finished:
                continue  # aborted while the step ran
            request.append_token(token_id)
            if request.is_finished:
                self.release(request)

    def release(self, request: Request) -> None:
        """Drop a finished request, wherever it stands, and free its blocks."""
        self.pool.free(request.request_id)
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
