"""The scheduler against a fake executor: any arrivals, lengths, limits, pool sizes and aborts."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.kv_blocks import BlockPool
from engine.request import FinishReason, Request, RequestState
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, SchedulerConfig, StepPlan

BLOCK_SIZE = 4


@dataclass(frozen=True)
class Arrival:
    """A request to come: when, how long, and the step at which its user goes away, if ever."""

    step: int
    num_prompt: int
    max_tokens: int
    abort_step: int | None


ARRIVALS = st.builds(
    Arrival,
    step=st.integers(0, 20),
    num_prompt=st.integers(1, 30),
    max_tokens=st.integers(1, 20),
    abort_step=st.none() | st.integers(0, 60),
)


class FakeExecutor:
    """Stands for the model: knows which positions are in the cache and what the tokens are.

    The token sampled at position `p` is `p`, and it must not matter how often it is computed.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerConfig) -> None:
        self.pool = pool
        self.limits = limits
        self.cached: dict[str, int] = {}

    def execute(self, plan: StepPlan) -> list[int]:
        for request in plan.preempted:
            assert request.state is RequestState.WAITING
            assert not self.pool.block_table(request.request_id)
            self.cached.pop(request.request_id, None)
        scheduled = plan.scheduled
        assert len({item.request.request_id for item in scheduled}) == len(scheduled)
        assert not set(plan.preempted) & {item.request for item in scheduled}
        assert len(scheduled) <= self.limits.max_num_seqs
        assert plan.num_tokens == sum(item.num_tokens for item in scheduled)
        assert 0 < plan.num_tokens <= self.limits.max_num_batched_tokens
        assert all(item.num_tokens == 1 for item in plan.decodes)
        for item in scheduled:
            # Contiguous with what the cache holds, so each position exactly once.
            assert item.start == self.cached.get(item.request.request_id, 0)
            assert item.num_tokens >= 1
            assert item.end <= item.request.num_tokens
            held = len(self.pool.block_table(item.request.request_id))
            assert held * BLOCK_SIZE >= item.end
            assert item.samples == (item.end == item.request.num_tokens)
            self.cached[item.request.request_id] = item.end
        return [item.end for item in plan.sampling]


def make_request(name: str, num_prompt: int, max_tokens: int, **options) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(num_prompt)),
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=10_000,
        **options,
    )


@settings(max_examples=300, deadline=None)
@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=12),
    spare_blocks=st.integers(0, 20),
    max_num_seqs=st.integers(1, 8),
    spare_tokens=st.integers(0, 40),
)
def test_any_load(arrivals, spare_blocks, max_num_seqs, spare_tokens) -> None:
    arrivals = sorted(arrivals, key=lambda arrival: arrival.step)
    longest = max(a.num_prompt + a.max_tokens for a in arrivals)
    pool = BlockPool(-(-longest // BLOCK_SIZE) + spare_blocks, BLOCK_SIZE)
    limits = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + spare_tokens
    )
    scheduler, executor = Scheduler(limits, pool), FakeExecutor(pool, limits)
    requests: list[Request] = []
    # Each request alone needs at most one step a token, and each may be preempted by each other.
    most_steps = 100 + sum(a.num_prompt + a.max_tokens for a in arrivals) * len(arrivals)
    step = 0
    while step <= 20 or any(not r.is_finished for r in requests):
        assert step < most_steps, "a request starves"
        for a in arrivals:
            if a.step == step:
                requests.append(make_request(str(len(requests)), a.num_prompt, a.max_tokens))
                scheduler.add(requests[-1])
        for request, a in zip(requests, arrivals, strict=False):
            if a.abort_step == step and not request.is_finished:
                request.finish(FinishReason.ABORT)
                scheduler.release(request)
                executor.cached.pop(request.request_id, None)
                pool.check_integrity()
        outputs = {r.request_id: list(r.output_token_ids) for r in requests}
        plan = scheduler.plan_step()
        pool.check_integrity()
        assert scheduler.num_running <= max_num_seqs
        if plan.is_empty:
            assert all(r.is_finished for r in requests), "work is left, but none is planned"
        else:
            running = [r for r in requests if not r.is_finished]
            assert any(item.request is running[0] for item in plan.scheduled), "the first waits"
            scheduler.complete_step(plan, executor.execute(plan))
            pool.check_integrity()
        for request in requests:  # nothing is lost on preemption
            before = outputs[request.request_id]
            assert request.output_token_ids[: len(before)] == before
            assert len(request.output_token_ids) <= len(before) + 1
        step += 1
    for request, a in zip(requests, arrivals, strict=True):
        if request.finish_reason is FinishReason.ABORT:
            continue
        expected = list(range(a.num_prompt, a.num_prompt + a.max_tokens))
        assert request.output_token_ids == expected
        assert request.finish_reason is FinishReason.LENGTH
    assert pool.num_used == 0
    assert scheduler.num_running == scheduler.num_waiting == 0


def run_to_end(scheduler: Scheduler, executor: FakeExecutor) -> list[StepPlan]:
    plans = []
    while list(scheduler.requests()):
        plan = scheduler.plan_step()
        scheduler.complete_step(plan, executor.execute(plan))
        plans.append(plan)
    return plans


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes() -> None:
    pool = BlockPool(100, BLOCK_SIZE)
    limits = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=10)
    scheduler, executor = Scheduler(limits, pool), FakeExecutor(pool, limits)
    short, long = make_request("short", 3, 5), make_request("long", 25, 1)
    scheduler.add(short)
    scheduler.add(long)
    plans = run_to_end(scheduler, executor)
    chunks = [[(i.start, i.num_tokens) for i in p.prefills if i.request is long] for p in plans]
    assert chunks == [[(0, 7)], [(7, 9)], [(16, 9)], [], []]
    assert [len(p.decodes) for p in plans] == [0, 1, 1, 1, 1]


def test_the_latest_is_preempted_and_comes_back_before_later_ones() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    scheduler, executor = Scheduler(limits, pool), FakeExecutor(pool, limits)
    first, second, third = (make_request(name, 4, 6) for name in ("1", "2", "3"))
    for request in (first, second, third):
        scheduler.add(request)
    plans = run_to_end(scheduler, executor)
    assert first.num_preemptions == 0
    assert second.num_preemptions + third.num_preemptions > 0
    assert first.finish_time_s <= second.finish_time_s <= third.finish_time_s
    assert sum(len(plan.preempted) for plan in plans) == sum(
        request.num_preemptions for request in (first, second, third)
    )


def test_an_earlier_request_that_does_not_fit_holds_back_later_ones() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    scheduler = Scheduler(limits, pool)
    for name, num_prompt in (("running", 8), ("large", 12), ("small", 1)):
        scheduler.add(make_request(name, num_prompt, 2))
    plan = scheduler.plan_step()
    assert [item.request.request_id for item in plan.scheduled] == ["running"]
    assert scheduler.num_waiting == 2


def test_a_request_aborted_while_its_step_ran_gets_no_token() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8), pool)
    request = make_request("r", 3, 5)
    scheduler.add(request)
    plan = scheduler.plan_step()
    request.finish(FinishReason.ABORT)
    scheduler.release(request)
    scheduler.complete_step(plan, [7])
    assert request.output_token_ids == []
    assert pool.num_used == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, r"at least max_num_seqs \(9\), got 8"),
    ],
)
def test_limits_are_checked(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**options)
