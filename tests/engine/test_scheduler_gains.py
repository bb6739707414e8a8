"""What offloading is worth, by simulated runs on three machines; and that it never costs anything.

Bounds are loose: they say that the scheduler sees where offloading pays, not how much exactly.
"""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from engine.graph_limits import prompt_room
from engine.scheduling.scheduler_config import MODES
from engine.step_plan import StepMode
from tests.engine.step_simulation import H200, LLAMA2_7B, LLAMA3_8B, T4, a10g, simulate
from workloads.simulation.simulator import Simulation

AT_ONCE = replace(H200, launch_s=0.0, handover_launch_s=0.0, handover_s=7.5e-6)
"""A fast GPU whose steps are launched at once, whatever they compute."""


def summarize_like(num_requests: int) -> list[tuple[int, int]]:
    """Prompts of 372 ± 104 tokens, outputs of 45 ± 9."""
    rng = random.Random(0)
    return [
        (min(589, max(29, round(rng.gauss(372, 104)))), max(15, round(rng.gauss(45, 9))))
        for _ in range(num_requests)
    ]


def uniform(num_requests: int, num_prompt: int, num_output: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    return [
        (
            rng.randint(round(0.9 * num_prompt), round(1.1 * num_prompt)),
            rng.randint(round(0.9 * num_output), round(1.1 * num_output)),
        )
        for _ in range(num_requests)
    ]


def gain(*args, **options) -> tuple[float, Simulation]:
    """Throughput of mode auto over that of mode gpu-only."""
    auto = simulate(*args, mode="auto", **options)
    gpu_only = simulate(*args, mode="gpu-only", **options)
    assert auto.num_finished == gpu_only.num_finished == len(args[2])
    return auto.requests_per_s / gpu_only.requests_per_s, auto


def test_a_t4_with_54_device_blocks_gains_several_times() -> None:
    """50 GB of host KV for Llama-2-7B: 100,000 tokens."""
    ratio, auto = gain(T4, LLAMA2_7B, summarize_like(300), device_tokens=864, host_tokens=100_000)
    assert ratio > 7.5
    assert auto.modes[StepMode.ASYMMETRIC] > auto.modes[StepMode.GPU_ONLY]


def test_an_h200_with_26400_device_tokens_stays_gpu_only() -> None:
    ratio, auto = gain(
        H200, LLAMA3_8B, uniform(150, 1000, 100), device_tokens=26_400, host_tokens=800_000
    )
    assert auto.modes[StepMode.ASYMMETRIC] == 0
    assert ratio >= 0.99


@pytest.mark.parametrize(
    ("cpu_bandwidth_bytes_s", "num_output", "least"),
    [(150e9, 75, 1.08), (150e9, 200, 1.28), (75e9, 400, 1.3)],
)
def test_an_a10g_gains_in_between(cpu_bandwidth_bytes_s, num_output, least) -> None:
    ratio, auto = gain(
        a10g(cpu_bandwidth_bytes_s),
        LLAMA3_8B,
        uniform(150, 1000, num_output),
        device_tokens=26_400,
        host_tokens=800_000,
    )
    assert least < ratio < 2.0
    assert auto.modes[StepMode.ASYMMETRIC] > 0


@pytest.mark.parametrize("cpu_bandwidth_bytes_s", [5e9, 20e9, 45e9])
@pytest.mark.parametrize(("num_prompt", "num_output"), [(100, 300), (1000, 50)])
def test_a_slow_host_costs_nothing(cpu_bandwidth_bytes_s, num_prompt, num_output) -> None:
    ratio, _ = gain(
        a10g(cpu_bandwidth_bytes_s),
        LLAMA3_8B,
        uniform(60, num_prompt, num_output),
        device_tokens=5_000,
        host_tokens=200_000,
    )
    assert ratio >= 0.98


@pytest.mark.parametrize("num_output", [50, 200])
@pytest.mark.parametrize("model", [LLAMA3_8B, LLAMA2_7B])
@pytest.mark.parametrize(
    "hardware", [T4, a10g(150e9), H200, AT_ONCE], ids=["t4", "a10g", "h200", "h200-at-once"]
)
def test_auto_loses_to_no_mode(hardware, model, num_output) -> None:
    """Never slower than without a host, and nearly as fast as the best mode that is forced."""
    lengths = uniform(60, 700, num_output)
    options = {"device_tokens": 10_000, "host_tokens": 200_000}
    rates = {
        mode: simulate(hardware, model, lengths, mode=mode, **options).requests_per_s
        for mode in MODES
    }
    assert rates["auto"] >= 0.99 * rates["gpu-only"]
    assert rates["auto"] >= 0.9 * max(rates.values())


def test_rotating_rows_pay_on_a_fast_gpu_whose_steps_are_launched_at_once() -> None:
    """The weights are read once, where an asymmetric step reads them twice."""
    lengths = uniform(600, 1000, 200)
    options = {"device_tokens": 26_400, "host_tokens": 400_000, "max_num_batched_tokens": 1024}
    ratio, auto = gain(AT_ONCE, LLAMA3_8B, lengths, **options)
    assert ratio > 1.07
    assert auto.modes[StepMode.OVERLAP] > auto.modes[StepMode.ASYMMETRIC]
    assert auto.shares.cpu_busy > 0.4


@pytest.mark.parametrize("slow_answers", [False, True])
def test_the_host_is_not_used_in_one_way_now_and_in_another_then(slow_answers) -> None:
    """Else rotations never fill, and a wrong prediction of one way spoils both."""
    modes = []
    options = {"device_tokens": 864, "host_tokens": 100_000, "max_num_batched_tokens": 832}
    options["slow_answers"] = slow_answers
    auto = simulate(
        H200,
        LLAMA2_7B,
        summarize_like(300),
        mode="auto",
        on_step=lambda plan, now, simulator: modes.append(plan.mode),
        **options,
    )
    host = [mode for mode in modes if mode is not StepMode.GPU_ONLY]
    assert sum(a is not b for a, b in pairwise(host)) <= 20
    for mode, least in (("overlap", 0.95), ("asymmetric", 1.0), ("gpu-only", 1.5)):
        other = simulate(H200, LLAMA2_7B, summarize_like(300), mode=mode, **options)
        assert auto.requests_per_s >= least * other.requests_per_s


@pytest.mark.parametrize(("most", "num_rows"), [(512, 512), (832, 768), (200, 200)])
def test_prompts_beside_a_rotation_leave_room_for_it(most: int, num_rows: int) -> None:
    """A few rows more than whole tiles would cost a step as much as many."""
    fills = []

    def check(plan, now, simulator) -> None:
        [batch] = plan.sub_batches
        prompts = sum(item.num_tokens for item in batch.gprf + batch.cprf)
        assert prompts + len(batch.gdec) <= num_rows
        visitors = max(Counter(row.layer for row in batch.rotating).values(), default=0)
        if prompts and visitors:
            sizes = {min(256, num_rows), min(512, num_rows), num_rows}
            rooms = [prompt_room(size, len(batch.gdec), visitors) for size in sizes]
            fills.append(prompts in rooms)
            assert prompts <= max(rooms)

    simulate(
        AT_ONCE,
        LLAMA3_8B,
        uniform(40, 1000, 100),
        device_tokens=8_000,
        host_tokens=400_000,
        max_num_batched_tokens=most,
        max_num_seqs=128,
        mode="overlap",
        on_step=check,
    )
    assert sum(fills) > len(fills) / 4


def test_prompts_beside_a_full_rotation_come_whole_or_fill_a_graph() -> None:
    """What is cut off comes back over PCIe for the rest; many at once would keep the host waiting.

    A graph of whole tiles has room for 8 decodes and 8 rotating rows of a layer.
    """
    sizes, ends_whole = [], []

    def note(plan, now, simulator) -> None:
        [batch] = plan.sub_batches
        if batch.cprf and len(batch.rotating) > 90:
            sizes.append(sum(item.num_tokens for item in batch.cprf + batch.gprf))
            ends_whole.append(all(item.samples for item in batch.cprf))

    options = {"device_tokens": 864, "host_tokens": 100_000, "max_num_batched_tokens": 832}
    simulate(AT_ONCE, LLAMA2_7B, summarize_like(200), mode="overlap", on_step=note, **options)
    assert len(sizes) > 20
    assert sum(size <= 512 for size in sizes) > 0.8 * len(sizes)
    assert all(
        whole or (size + 16) % 128 == 0 for size, whole in zip(sizes, ends_whole, strict=True)
    )
    assert sum(ends_whole) > 0.5 * len(ends_whole)


def test_a_rotating_token_takes_as_many_steps_as_there_are_layers_and_one() -> None:
    steps = []
    simulate(
        AT_ONCE,
        LLAMA3_8B,
        [(100, 4)],
        device_tokens=64,
        host_tokens=1_000,
        mode="overlap",
        on_step=lambda plan, now, simulator: steps.append(plan),
    )
    assert len(steps) == 1 + 3 * (LLAMA3_8B.num_layers + 1)
    assert [len(plan.sampling) for plan in steps] == [1, *([*[0] * 32, 1] * 3)]
    layers = [row.layer for plan in steps[1:] for row in plan.rotating]
    assert layers == [None, *range(32)] * 3


def test_a_limit_on_a_token_s_time_counts_all_steps_of_a_rotation() -> None:
    lengths = uniform(200, 1000, 400)
    options = {"device_tokens": 20_000, "host_tokens": 400_000, "max_num_batched_tokens": 1024}
    free = simulate(AT_ONCE, LLAMA3_8B, lengths, mode="auto", **options)
    limited = simulate(AT_ONCE, LLAMA3_8B, lengths, mode="auto", tpot_limit_ms=100, **options)
    assert free.modes[StepMode.OVERLAP] > 0
    assert limited.modes[StepMode.OVERLAP] == 0


def test_few_requests_that_fit_the_device_stay_there() -> None:
    ratio, auto = gain(T4, LLAMA2_7B, uniform(8, 300, 50), device_tokens=8_000, host_tokens=100_000)
    assert ratio == pytest.approx(1.0)
    assert auto.modes[StepMode.ASYMMETRIC] == auto.num_swaps == 0


def test_a_request_far_larger_than_the_device_runs_beside_others() -> None:
    auto = simulate(
        H200,
        LLAMA3_8B,
        [(40_000, 20), *uniform(20, 500, 50)],
        device_tokens=8_000,
        host_tokens=100_000,
        mode="auto",
    )
    assert auto.num_finished == 21
    assert auto.modes[StepMode.ASYMMETRIC] > 0


def test_a_latency_limit_is_kept_where_it_can_be() -> None:
    """A T4 decodes in 60 ms at best; prompts of 372 tokens would add 120."""
    slow = []

    def check(plan, now, simulator) -> None:
        if plan.prediction.step_s > 0.150:
            slow.append(plan.num_decodes == 0 or plan.forced)

    auto = simulate(
        T4,
        LLAMA2_7B,
        summarize_like(60),
        device_tokens=864,
        host_tokens=100_000,
        on_step=check,
        mode="auto",
        tpot_limit_ms=150.0,
    )
    assert all(slow)
    assert auto.modes[StepMode.ASYMMETRIC] > 0


@pytest.mark.parametrize("mode", ["gpu-only", "auto"])
def test_requests_that_arrive_together_fill_the_pool_before_they_end_together(mode) -> None:
    """A few are evicted and come back later; 89 % of the pool would be used without that."""
    used = []
    options = {"device_tokens": 26_400, "host_tokens": 400_000, "max_num_batched_tokens": 512}
    lengths = uniform(80, 1000, 400)
    run = simulate(
        H200,
        LLAMA3_8B,
        lengths,
        mode=mode,
        on_step=lambda plan, now, simulator: used.append(simulator.device_pool.num_used),
        **options,
    )
    assert run.num_finished == len(lengths)
    assert run.num_preemptions + run.num_swaps / 2 < len(lengths) / 4
    in_the_middle = used[len(used) // 5 : 3 * len(used) // 5]
    assert sum(in_the_middle) / len(in_the_middle) > 0.92 * 26_400 // 16


@pytest.mark.parametrize(("num_requests", "is_small"), [(120, True), (14, False)])
def test_prompts_on_the_device_come_in_small_chunks_while_others_wait(
    num_requests, is_small
) -> None:
    """Their first rows are nearly free beside decodes, and later ones wait anyway."""
    sizes = []

    def note(plan, now, simulator) -> None:
        [batch] = plan.sub_batches
        if len(batch.gdec) > 12 and batch.gprf:
            sizes.append(sum(item.num_tokens for item in batch.gprf))

    lengths = uniform(num_requests, 1000, 200)
    options = {"device_tokens": 26_400, "host_tokens": 1_600, "max_num_batched_tokens": 1024}
    simulate(H200, LLAMA3_8B, lengths, mode="gpu-only", on_step=note, **options)
    small = [size <= 256 for size in sizes]
    assert small
    assert sum(small) > 0.9 * len(small) if is_small else not any(small)


def test_who_was_evicted_comes_back_before_others_start() -> None:
    """Else a request stops in the middle of its answer for as long as there is a queue."""
    options = {"device_tokens": 8_000, "host_tokens": 200_000, "max_num_batched_tokens": 512}
    lengths = uniform(400, 100, 60)
    run = simulate(H200, LLAMA3_8B, lengths, mode="auto", min_offload_gain=10.0, **options)
    assert run.num_swaps > 50
    times = [record.token_times_s for record in run.records]
    assert max(after - before for steps in times for before, after in pairwise(steps)) < 0.5
