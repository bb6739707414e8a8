"""What the policy makes of a load: how many requests on the host, and when it stops."""

from dataclasses import replace

import pytest

from engine.cost_model import AnalyticCostModel
from engine.request import Placement
from engine.scheduling.offload_policy import OffloadPolicy
from engine.scheduling.scheduler_config import SchedulerConfig
from engine.scheduling.steady_state import MeanLoad, SteadyState, highest, result_of
from tests.engine.step_simulation import LLAMA2_7B, LLAMA3_8B, T4, a10g, make_request
from tests.engine.test_scheduler_gains import AT_ONCE

NUM_TOKENS = 1100


def requests(number: int, placement: Placement | None):
    """Make requests in the middle of their outputs, or waiting ones."""
    made = [make_request(f"{placement}-{i}", NUM_TOKENS - 100, 200) for i in range(number)]
    for request in made:
        request.placement = placement
        if placement is not None:
            request.num_computed_tokens = NUM_TOKENS - 100
    return made


def make_policy() -> OffloadPolicy:
    config = SchedulerConfig(max_num_batched_tokens=1024, policy_interval_steps=1)
    model = AnalyticCostModel(AT_ONCE, LLAMA3_8B)
    return OffloadPolicy(config, model, device_tokens=24 * NUM_TOKENS, host_tokens=400_000)


@pytest.mark.parametrize("num_output", [50, 200, 800])
@pytest.mark.parametrize(
    ("hardware", "model"), [(AT_ONCE, LLAMA3_8B), (a10g(150e9), LLAMA3_8B), (T4, LLAMA2_7B)]
)
def test_the_number_on_the_host_is_nearly_the_best_there_is(hardware, model, num_output) -> None:
    steady = SteadyState(SchedulerConfig(), AnalyticCostModel(hardware, model))
    load = MeanLoad(400, 1000, num_output)
    for rate_of, least in ((steady.rate, 0.97), (steady.rotating_rate, 0.99)):
        rates = [rate_of(load, 10, number) for number in range(1, 301)]
        rate, number = result_of(highest(lambda n, rates=rates: rates[n - 1], len(rates)))
        assert rate == rates[number - 1]
        assert rate >= least * max(rates)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 100])
def test_the_number_on_the_host_is_found_at_both_ends(most) -> None:
    assert result_of(highest(lambda number: number, most)) == (most, most)
    assert result_of(highest(lambda number: -number, most)) == (-1, 1)


def test_prompts_in_many_chunks_gain_less_where_what_was_before_them_comes_back_slowly() -> None:
    load = MeanLoad(400, 1000, 200)
    lost = []
    for bandwidth in (50e9, 10e9):
        gains = []
        for budget in (256, 1024):
            config = SchedulerConfig(max_num_batched_tokens=budget)
            machine = replace(AT_ONCE, pcie_bytes_s=bandwidth)
            steady = SteadyState(config, AnalyticCostModel(machine, LLAMA3_8B))
            gains.append(steady.rotating_rate(load, 24, 150) / steady.rate(load, 24, 0))
        lost.append(gains[1] - gains[0])
    assert lost[0] < 0.02
    assert lost[1] > 0.05


def test_a_rotation_is_emptied_once_its_prompts_do_not_pay_and_filled_again_if_they_do() -> None:
    policy = make_policy()
    running = requests(24, Placement.DEVICE)
    policy.update(running, requests(400, None))
    assert policy.offloads
    assert policy.target.rotates
    assert policy.target.num_host > 100

    running += requests(100, Placement.HOST)
    policy.update(running, [])
    assert policy.offloads
    assert policy.target.rotates
    assert policy.target.num_host == 0, "no more prompts for the host"

    policy.update(running, requests(400, None))
    assert policy.target.num_host > 100


@pytest.mark.parametrize("num_host", [0, 8])
def test_a_rotation_of_few_is_given_up(num_host) -> None:
    policy = make_policy()
    running = requests(24, Placement.DEVICE)
    policy.update(running, requests(400, None))
    assert policy.offloads
    policy.update(running + requests(num_host, Placement.HOST), [])
    assert not policy.offloads


def test_a_look_at_a_load_that_goes_on_takes_several_steps(monkeypatch) -> None:
    policy, rates = make_policy(), []
    for name in ("rate", "rotating_rate"):
        compute = getattr(SteadyState, name)

        def counted(*args, compute=compute) -> float:
            rates.append(args)
            return compute(*args)

        monkeypatch.setattr(SteadyState, name, counted)
    running = requests(24, Placement.DEVICE)
    policy.update(running, requests(400, None))
    assert len(rates) > 20, "a new load is looked at in one go"
    found = policy.best_target(policy._last_load)
    assert policy.target == found
    counts = []
    for _ in range(100):
        rates.clear()
        policy.update(running, requests(300, None))
        counts.append(len(rates))
    assert max(counts) <= 3, "two rates, and that of the device alone"
    assert sum(counts) > 20
    assert policy.target == policy.best_target(policy._last_load) != found
