"""What the scheduler does, one rule at a time."""

from itertools import pairwise

import pytest

from engine.errors import ConfigError
from engine.kv_blocks import BlockPool
from engine.request import FinishReason, Placement
from engine.scheduling.offload_policy import OffloadPolicy
from engine.scheduling.scheduler import Scheduler, SchedulerConfig
from engine.step_plan import StepMode, StepPlan
from tests.engine.cost_tables import make_cost_model
from tests.engine.fake_executor import FakeExecutor, run_to_end
from tests.engine.step_simulation import make_request

BLOCK_SIZE = 4


def make_scheduler(
    num_device: int, num_host: int | None, *, max_num_seqs: int = 4, budget: int = 64, **options
) -> tuple[Scheduler, FakeExecutor]:
    device = BlockPool(num_device, BLOCK_SIZE)
    host = None if num_host is None else BlockPool(num_host, BLOCK_SIZE)
    cost_model = options.pop("cost_model", make_cost_model())
    options.setdefault("admission_lookahead", False)  # so that pools do get too small
    limits = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **options)
    scheduler = Scheduler(limits, device, host, cost_model)
    return scheduler, FakeExecutor(limits, device, host, cost_model)


def step(scheduler: Scheduler, executor: FakeExecutor) -> StepPlan:
    plan = scheduler.plan_step()
    scheduler.complete_step(plan, executor.execute(plan))
    return plan


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes() -> None:
    scheduler, executor = make_scheduler(100, None, max_num_seqs=2, budget=10)
    short, long = make_request("short", 3, 5), make_request("long", 25, 1)
    scheduler.add(short)
    scheduler.add(long)
    plans = run_to_end(scheduler, executor)
    batches = [plan.sub_batches[0] for plan in plans]
    chunks = [[(i.start, i.num_tokens) for i in b.gprf if i.request is long] for b in batches]
    assert chunks == [[(0, 7)], [(7, 9)], [(16, 9)], [], []]
    assert [len(b.gdec) for b in batches] == [0, 1, 1, 1, 1]


def test_the_latest_is_preempted_and_comes_back_before_later_ones() -> None:
    scheduler, executor = make_scheduler(4, None)
    requests = [make_request(name, 4, 6) for name in ("1", "2", "3")]
    for request in requests:
        scheduler.add(request)
    plans = run_to_end(scheduler, executor)
    first, second, third = requests
    assert first.num_preemptions == 0
    assert second.num_preemptions + third.num_preemptions > 0
    assert first.finish_time_s <= second.finish_time_s <= third.finish_time_s
    assert sum(len(plan.preempted) for plan in plans) == sum(r.num_preemptions for r in requests)


def test_an_earlier_request_that_does_not_fit_holds_back_later_ones() -> None:
    scheduler, _ = make_scheduler(4, None)
    for name, num_prompt in (("running", 8), ("large", 12), ("small", 1)):
        scheduler.add(make_request(name, num_prompt, 2))
    plan = scheduler.plan_step()
    assert [item.request.request_id for item in plan.scheduled] == ["running"]
    assert scheduler.num_waiting == 2


@pytest.mark.parametrize("num_device", [1, 4])
def test_a_request_aborted_while_its_step_ran_gets_no_token(num_device) -> None:
    scheduler, _ = make_scheduler(num_device, 4)
    request = make_request("r", 7, 5)
    scheduler.add(request)
    plan = scheduler.plan_step()
    assert scheduler.num_running_host == (num_device == 1)
    request.finish(FinishReason.ABORT)
    scheduler.release(request)
    scheduler.complete_step(plan, [7])
    assert request.output_token_ids == []
    assert scheduler.residency.device.num_used == scheduler.residency.host.num_used == 0


def test_a_request_larger_than_the_device_pool_lives_on_the_host() -> None:
    scheduler, executor = make_scheduler(4, 40, budget=16)
    request = make_request("large", 50, 20)
    scheduler.add(request)
    plans = run_to_end(scheduler, executor)
    assert {plan.mode for plan in plans} == {StepMode.ASYMMETRIC}
    assert [len(plan.sub_batches[0].cprf) for plan in plans] == [1] * 4 + [0] * 19
    assert len(request.output_token_ids) == 20


def test_a_request_that_outgrows_the_device_pool_moves_to_the_host() -> None:
    scheduler, executor = make_scheduler(4, 40)
    request = make_request("growing", 10, 20)
    scheduler.add(request)
    plans = run_to_end(scheduler, executor)
    assert sum(len(plan.swaps_out) for plan in plans) == 1
    assert request.num_preemptions == 0
    assert len(request.output_token_ids) == 20


def test_under_pressure_the_last_come_moves_out_and_comes_back_once_there_is_room() -> None:
    # The host is far too slow to be worth more than parking.
    cost_model = make_cost_model(cpu_token_s=1e-2, swap_token_s=1e-9)
    scheduler, executor = make_scheduler(6, 40, cost_model=cost_model, swap_cooldown_steps=2)
    first, second = make_request("1", 10, 8), make_request("2", 10, 14)
    scheduler.add(first)
    scheduler.add(second)
    plans = run_to_end(scheduler, executor)
    assert [s.request for plan in plans for s in plan.swaps_out] == [second]
    assert [s.request for plan in plans for s in plan.swaps_in] == [second]
    assert {plan.mode for plan in plans} == {StepMode.GPU_ONLY}
    assert first.num_preemptions == second.num_preemptions == 0


@pytest.mark.parametrize(
    ("num_blocks", "lengths", "has_company"), [(6, [8, 14], False), (10, [8, 20, 14], True)]
)
def test_who_comes_to_the_device_sits_a_step_out_if_others_go_on(
    num_blocks: int, lengths: list[int], has_company: bool
) -> None:
    cost_model = make_cost_model(cpu_token_s=1e-2, swap_token_s=1e-9)
    options = {"cost_model": cost_model, "swap_cooldown_steps": 2}
    scheduler, executor = make_scheduler(num_blocks, 40, **options)
    for length in lengths:
        scheduler.add(make_request(str(length), 6, length))
    host = executor.pools[Placement.HOST]
    while not (plan := step(scheduler, executor)).swaps_in:
        assert list(scheduler.requests()), "nobody came back"
    [swap] = plan.swaps_in
    assert plan.moves_beside == has_company
    assert (swap.request in {item.request for item in plan.scheduled}) != has_company
    assert set(swap.host_blocks) <= set(host.block_table(swap.request.request_id))
    following = step(scheduler, executor)
    assert swap.request in {item.request for item in following.scheduled}
    assert host.num_used == 0


def test_swapping_that_costs_more_than_computing_again_is_not_done() -> None:
    cost_model = make_cost_model(cpu_token_s=1e-2, swap_token_s=1.0)
    scheduler, executor = make_scheduler(6, 40, cost_model=cost_model)
    for name in ("1", "2"):
        scheduler.add(make_request(name, 10, 14))
    plans = run_to_end(scheduler, executor)
    assert not any(plan.swaps_out for plan in plans)
    assert any(plan.preempted for plan in plans)


def test_a_host_resident_request_that_never_pays_still_progresses() -> None:
    cost_model = make_cost_model(cpu_token_s=1e-2)
    scheduler, executor = make_scheduler(
        8, 40, cost_model=cost_model, max_skipped_steps=3, max_num_seqs=2
    )
    large, small = make_request("large", 40, 10), make_request("small", 4, 20)
    scheduler.add(large)
    scheduler.add(small)
    plans = run_to_end(scheduler, executor)
    forced = [plan for plan in plans if plan.forced]
    assert 1 < len(forced) < 9
    steps = [n for n, p in enumerate(plans) if large in {i.request for i in p.scheduled}]
    assert max(b - a for a, b in pairwise(steps)) <= 4


def test_mode_asymmetric_computes_every_host_resident_row_in_every_step() -> None:
    cost_model = make_cost_model(cpu_token_s=1e-2)
    scheduler, executor = make_scheduler(
        6, 100, cost_model=cost_model, mode="asymmetric", max_num_seqs=8, budget=200
    )
    for name in "abcdef":
        scheduler.add(make_request(name, 10, 5))
    plan = step(scheduler, executor)
    assert len(plan.sub_batches[0].gprf) == 2
    assert len(plan.sub_batches[0].cprf) == 4
    plan = step(scheduler, executor)
    assert plan.mode is StepMode.ASYMMETRIC
    assert sum(len(s.cdec) for s in plan.sub_batches) == 4
    assert scheduler.num_running_host == 4


def test_chunks_shrink_to_the_latency_limit() -> None:
    # 3 layers of 1 ms, and of 0.1 ms for each row beyond 100: the limit leaves room for some.
    cost_model = make_cost_model(weights_s=1e-3, row_s=1e-4)
    options = {"cost_model": cost_model, "max_num_seqs": 2, "budget": 1000}
    scheduler, executor = make_scheduler(300, None, tpot_limit_ms=10.0, **options)
    scheduler.add(make_request("decoding", 4, 30))
    step(scheduler, executor)
    long = make_request("long", 700, 2)
    scheduler.add(long)
    plan = step(scheduler, executor)
    assert plan.num_decodes == 1
    assert 0.009 < plan.prediction.step_s <= 0.010
    assert 100 < long.num_computed_tokens < 200


def test_after_a_failed_step_what_was_not_aborted_starts_again() -> None:
    scheduler, executor = make_scheduler(4, 40, mode="asymmetric")
    requests = [make_request(name, 10, 5) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    step(scheduler, executor)
    plan = scheduler.plan_step()
    assert len(plan.scheduled) == 3
    scheduler.abandon_step(plan)
    assert scheduler.residency.device.num_used == scheduler.residency.host.num_used == 0
    requests[0].finish(FinishReason.ABORT)
    scheduler.release(requests[0])
    run_to_end(scheduler, executor)
    assert [len(r.output_token_ids) for r in requests] == [1, 5, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, r"at least max_num_seqs \(9\), got 8"),
        ({"mode": "gpu"}, "mode must be one of auto, gpu-only, asymmetric, overlap, got gpu"),
        ({"tpot_limit_ms": 0}, "tpot_limit_ms must be above 0, got 0"),
        ({"min_offload_gain": 0.9}, "min_offload_gain must be at least 1, got 0.9"),
        ({"policy_interval_steps": 0}, "policy_interval_steps must be at least 1, got 0"),
        ({"max_skipped_steps": -1}, "max_skipped_steps must be at least 0, got -1"),
        ({"max_parked_steps": -1}, "max_parked_steps must be at least 0, got -1"),
        ({"swap_cooldown_steps": 0}, "swap_cooldown_steps must be at least 1, got 0"),
        ({"headroom_blocks": -1}, "headroom_blocks must be at least 0, got -1"),
    ],
)
def test_options_are_checked(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**options)


def test_pools_must_have_the_same_block_size() -> None:
    with pytest.raises(ValueError, match="same block_size, got 4 and 8"):
        Scheduler(SchedulerConfig(), BlockPool(4, 4), BlockPool(4, 8), make_cost_model())


@pytest.mark.parametrize(
    ("sizes", "layers", "expected"),
    [
        ((5, 5), (1, None), ["1"]),
        ((5, 5), (1, 0), []),
        ((5, 12, 8), (None, None, None), ["1"]),
        ((5, 12, 8), (None, 3, None), ["2"]),
        ((5, 60, 8), (None, None, None), ["2"]),
    ],
    ids=["between-tokens", "nobody", "longest", "longest-between-tokens", "longest-that-fits"],
)
def test_the_longest_that_fits_and_is_between_two_tokens_leaves_a_rotation(
    sizes, layers, expected
) -> None:
    scheduler, _ = make_scheduler(10, 80, mode="overlap")
    for index, (num_tokens, layer) in enumerate(zip(sizes, layers, strict=True)):
        request = make_request(str(index), num_tokens, 9)
        scheduler.add(request)
        scheduler._start(request, Placement.HOST)
        request.num_computed_tokens, request.rotation_layer = num_tokens - 1, layer
    swaps = scheduler.plan_step().swaps_in
    assert [swap.request.request_id for swap in swaps] == expected


def test_without_a_rotation_who_came_first_goes_to_the_device_first() -> None:
    """A longer one that fits, too, waits for its turn, and so does one that is free sooner."""
    scheduler, _ = make_scheduler(10, 80, mode="auto")
    for name, num_tokens, layer in (("first", 5, 1), ("second", 12, 2)):
        request = make_request(name, num_tokens, 9)
        scheduler.add(request)
        scheduler._start(request, Placement.HOST)
        request.num_computed_tokens, request.rotation_layer = num_tokens - 1, layer
    scheduler.policy.offloads = False
    [swap] = scheduler.plan_step().swaps_in
    assert swap.request.request_id == "first"


@pytest.mark.parametrize(("num_device", "starts"), [(6, True), (5, False)])
def test_others_start_on_blocks_that_one_parked_on_the_host_leaves(num_device, starts) -> None:
    """It was just swapped out, and comes back to three blocks and one to grow."""
    scheduler, _ = make_scheduler(num_device, 80, min_offload_gain=100)
    parked, other = make_request("parked", 12, 9), make_request("other", 5, 9)
    scheduler.add(parked)
    scheduler._start(parked, Placement.HOST)
    parked.num_computed_tokens, parked.last_swap_step = 11, 0
    scheduler.add(other)
    plan = scheduler.plan_step()
    assert (other in plan.requests) is starts
    assert parked.placement is Placement.HOST


def test_a_load_that_has_doubled_is_looked_at_before_its_time() -> None:
    model = make_cost_model()
    policy = OffloadPolicy(SchedulerConfig(policy_interval_steps=1000), model, 64, 6400)
    requests = [make_request(str(i), 40, 40) for i in range(5)]
    for num_waiting, num_looked_at in ((2, 2), (4, 2), (5, 5)):
        policy.update([], requests[:num_waiting])
        assert policy._last_load.num_requests == num_looked_at
