"""The scheduler against a fake executor: any arrivals, lengths, limits, pools, costs and aborts."""

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.cost_model import rotation_steps
from engine.kv_blocks import BlockPool
from engine.request import FinishReason, Placement, Request, RequestState
from engine.scheduling.scheduler import Scheduler, SchedulerConfig
from engine.scheduling.scheduler_config import MODES
from engine.step_plan import StepMode, StepPlan
from tests.engine.cost_tables import COST_MODELS
from tests.engine.fake_executor import FakeExecutor
from tests.engine.step_simulation import make_request

BLOCK_SIZE = 4


@dataclass(frozen=True)
class Arrival:
    """A request to come: when, how long, and the step at which its user goes away, if ever."""

    step: int
    num_prompt: int
    max_tokens: int
    abort_step: int | None


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 20),
        num_prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        abort_step=st.none() | st.integers(0, 60),
    ),
    min_size=1,
    max_size=12,
).map(lambda arrivals: sorted(arrivals, key=lambda arrival: arrival.step))


class Run:
    """Serves arrivals to the end and checks everything on the way.

    `ahead`: a step is planned while the one before it is still on its way.
    """

    def __init__(
        self, arrivals, limits, device, host, cost_model, failing_steps=(), ahead=False
    ) -> None:
        self.arrivals, self.limits = arrivals, limits
        self.failing_steps = failing_steps
        self.ahead = ahead
        self.on_its_way: tuple[StepPlan, list[int]] | None = None
        self.pools = [pool for pool in (device, host) if pool is not None]
        self.scheduler = Scheduler(limits, device, host, cost_model)
        self.executor = FakeExecutor(limits, device, host, cost_model)
        self.requests: list[Request] = []
        self.last_swap: dict[Request, int] = {}
        # Each request alone needs at most one step a token; each may be preempted by each other;
        # on the host each may be left out for as long as the options and its neighbours allow.
        num_tokens = sum(a.num_prompt + a.max_tokens for a in arrivals)
        self.most_skipped = max(limits.max_skipped_steps, limits.max_parked_steps) + len(arrivals)
        self.most_steps = 100 + num_tokens * len(arrivals) * (self.most_skipped + 1)
        self.most_steps *= rotation_steps(cost_model)

    def serve(self) -> None:
        step = 0
        while step <= 20 or any(not r.is_finished for r in self.requests):
            assert step < self.most_steps, "a request starves"
            self.arrive_and_abort(step)
            outputs = {r: list(r.output_token_ids) for r in self.requests}
            plan = self.scheduler.plan_step()
            self.check_plan(plan, step)
            if step in self.failing_steps and not plan.is_empty:
                self.complete()
                self.fail(plan)
            elif plan.is_empty:
                self.executor.move_blocks(plan)
            else:
                tokens = self.executor.execute(plan)
                self.scheduler.begin_step(plan)
                self.complete()
                self.on_its_way = (plan, tokens)
            if plan.is_empty or not self.ahead:
                self.complete()
            self.check_pools()
            for request, before in outputs.items():  # nothing is lost on preemption
                assert request.output_token_ids[: len(before)] == before
                assert len(request.output_token_ids) <= len(before) + 1
            step += 1
        self.check_end()

    def arrive_and_abort(self, step: int) -> None:
        for a in self.arrivals:
            if a.step == step:
                name = str(len(self.requests))
                self.requests.append(make_request(name, a.num_prompt, a.max_tokens))
                self.scheduler.add(self.requests[-1])
        for request, a in zip(self.requests, self.arrivals, strict=False):
            if a.abort_step == step and not request.is_finished:
                self.abort(request)
                self.check_pools()

    def complete(self) -> None:
        """Let the step that is on its way arrive, if there is one."""
        if self.on_its_way is not None:
            self.scheduler.complete_step(*self.on_its_way)
            self.on_its_way = None

    def abort(self, request: Request) -> None:
        request.finish(FinishReason.ABORT)
        self.scheduler.release(request)

    def fail(self, plan: StepPlan) -> None:
        """Every second request of the step is aborted; the others start again."""
        self.scheduler.abandon_step(plan)
        self.check_pools()
        for request in plan.requests[::2]:
            self.abort(request)

    def check_pools(self) -> None:
        for pool in self.pools:
            pool.check_integrity()

    def check_plan(self, plan: StepPlan, step: int) -> None:
        self.check_pools()
        unfinished = [r for r in self.requests if not r.is_finished]
        assert self.scheduler.num_running <= self.limits.max_num_seqs
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(unfinished)
        nothing_to_do = not unfinished or (plan.is_empty and self.on_its_way is not None)
        assert plan.is_empty == nothing_to_do, "work is left, but none is planned"
        for swap in plan.swaps_in:
            last = self.last_swap.get(swap.request, -self.most_steps)
            assert step - last > self.limits.swap_cooldown_steps, "flapping"
        for swap in plan.swaps_out + plan.swaps_in:
            self.last_swap[swap.request] = step
        for request in unfinished:
            if request.num_uncomputed_tokens == 1 and not request.awaits_last_token:
                assert request.num_skipped_steps <= self.most_skipped
        scheduled = {item.request for item in plan.scheduled}
        arriving = {swap.request for swap in plan.swaps_in if plan.moves_beside}
        assert not arriving or not plan.is_empty, "nothing is done beside the move"
        assert not arriving & (scheduled | {row.share.request for row in plan.rotating})
        for request in unfinished:
            on_device = request.placement is Placement.DEVICE
            runs = request.state is RequestState.RUNNING and not request.awaits_last_token
            runs = runs and request not in arriving
            if runs and request.num_uncomputed_tokens == 1:
                assert request in scheduled or not on_device, "a device-resident decode waits"

    def check_end(self) -> None:
        for request, a in zip(self.requests, self.arrivals, strict=True):
            if request.finish_reason is FinishReason.ABORT:
                continue
            expected = list(range(a.num_prompt, a.num_prompt + a.max_tokens))
            assert request.output_token_ids == expected
            assert request.finish_reason is FinishReason.LENGTH
        assert all(pool.num_used == 0 for pool in self.pools)
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert all(request.num_pending_tokens == 0 for request in self.requests)


def blocks_for_longest(arrivals) -> int:
    return max(-(-(a.num_prompt + a.max_tokens) // BLOCK_SIZE) for a in arrivals)


SLOW_TO_DRAW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW_TO_DRAW)
@given(
    arrivals=ARRIVALS,
    spare_blocks=st.integers(0, 20),
    max_num_seqs=st.integers(1, 8),
    spare_tokens=st.integers(0, 40),
    mode=st.sampled_from(MODES),
    cost_model=COST_MODELS,
    ahead=st.booleans(),
    lookahead=st.booleans(),
)
def test_any_load_on_the_device(
    arrivals, spare_blocks, max_num_seqs, spare_tokens, mode, cost_model, ahead, lookahead
) -> None:
    """Without a host pool; `gpu-only` must not touch the one it is given."""
    device = BlockPool(blocks_for_longest(arrivals) + spare_blocks, BLOCK_SIZE)
    host = BlockPool(100, BLOCK_SIZE) if mode == "gpu-only" else None
    limits = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare_tokens,
        mode=mode,
        admission_lookahead=lookahead,
    )
    run = Run(arrivals, limits, device, host, cost_model, ahead=ahead)
    check_plan = run.check_plan

    def check(plan: StepPlan, step: int) -> None:
        check_plan(plan, step)
        assert plan.mode is StepMode.GPU_ONLY
        assert not plan.swaps_out
        assert host is None or host.num_used == 0
        first = next((r for r in run.requests if not r.is_finished), None)
        if first is not None and not first.num_pending_tokens:
            assert any(i.request is first for i in plan.scheduled), "the first waits"

    run.check_plan = check
    run.serve()


@settings(max_examples=500, deadline=None, suppress_health_check=SLOW_TO_DRAW)
@given(data=st.data(), arrivals=ARRIVALS, cost_model=COST_MODELS)
def test_any_load_on_device_and_host(data, arrivals, cost_model) -> None:
    """Either pool may be too small for some requests, but one of them holds the longest."""
    longest = blocks_for_longest(arrivals)
    sizes = [data.draw(st.integers(1, longest + 20)), longest + data.draw(st.integers(0, 40))]
    device_blocks, host_blocks = data.draw(st.permutations(sizes))
    max_num_seqs = data.draw(st.integers(1, 8))
    limits = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + data.draw(st.integers(0, 40)),
        mode=data.draw(st.sampled_from(["auto", "asymmetric", "overlap"])),
        tpot_limit_ms=data.draw(st.none() | st.sampled_from([0.01, 0.3, 1.0, 10.0])),
        min_offload_gain=data.draw(st.sampled_from([1.0, 1.05, 2.0])),
        policy_interval_steps=data.draw(st.integers(1, 8)),
        max_skipped_steps=data.draw(st.integers(0, 6)),
        max_parked_steps=data.draw(st.integers(0, 12)),
        swap_cooldown_steps=data.draw(st.integers(1, 4)),
        headroom_blocks=data.draw(st.integers(0, 2)),
        admission_lookahead=data.draw(st.booleans()),
    )
    device, host = BlockPool(device_blocks, BLOCK_SIZE), BlockPool(host_blocks, BLOCK_SIZE)
    failing = data.draw(st.frozensets(st.integers(0, 30), max_size=3))
    ahead = data.draw(st.booleans())
    Run(arrivals, limits, device, host, cost_model, failing, ahead).serve()
