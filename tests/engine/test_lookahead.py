"""Admission by expected peaks, against stepping through every token."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduling.lookahead import PRIOR_OUTPUT_TOKENS, DeviceOutlook

BLOCK_SIZE = 16


def make(name: str, num_prompt: int, max_tokens: int, *, ignore_eos: bool = True) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[1] * num_prompt,
        params=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
        max_total_tokens=100_000,
    )


def most_tokens(requests: list[Request], num_steps: float) -> int:
    """Let every request grow a token a step until its end; return the most they hold together."""
    longest = max(r.params.max_tokens for r in requests)
    return max(
        sum(r.num_tokens + step for r in requests if r.params.max_tokens >= step)
        for step in range(int(min(longest, num_steps)) + 1)
    )


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 80)), min_size=2, max_size=12),
    st.integers(1, 200),
    st.integers(0, 90) | st.just(math.inf),
)
def test_peak_is_that_of_growing_step_by_step(lengths, num_blocks, least_steps) -> None:
    requests = [make(str(i), *pair) for i, pair in enumerate(lengths)]
    outlook = DeviceOutlook(requests[:-1], None, num_blocks, BLOCK_SIZE, least_steps)
    admitted = outlook.admit(requests[-1])
    if least_steps == 0:
        assert admitted
        return
    tokens, capacity = most_tokens(requests, least_steps - 1), num_blocks * BLOCK_SIZE
    if tokens > capacity:
        assert not admitted
    if tokens + len(requests) * BLOCK_SIZE <= capacity:
        assert admitted


def test_first_request_is_always_admitted() -> None:
    assert DeviceOutlook([], None, 1, BLOCK_SIZE).admit(make("a", 1000, 1000))


def test_admitted_requests_count_for_the_next() -> None:
    outlook = DeviceOutlook([], None, 20, BLOCK_SIZE)
    assert outlook.admit(make("a", 100, 20))
    assert outlook.admit(make("b", 100, 20))
    assert not outlook.admit(make("c", 100, 20))
    assert outlook.admit(make("d", 40, 1))


def test_mean_output_is_expected_of_requests_that_may_stop_by_themselves() -> None:
    def admits(mean: float | None, *, ignore_eos: bool = False, produced: int = 0) -> bool:
        running = make("a", 100, 5000, ignore_eos=ignore_eos)
        running.output_token_ids = [1] * produced
        outlook = DeviceOutlook([running], mean, 40, BLOCK_SIZE)
        return outlook.admit(make("b", 100, 5000, ignore_eos=ignore_eos))

    assert admits(50)
    assert not admits(50, ignore_eos=True)
    assert not admits(400)
    assert not admits(200, produced=380)  # beyond the mean it may still go on
    assert admits(None) == admits(PRIOR_OUTPUT_TOKENS)


@pytest.mark.parametrize(("least_steps", "admits"), [(30, True), (31, False), (math.inf, False)])
def test_a_request_that_will_be_evicted_starts_if_it_has_steps_enough_before(
    least_steps, admits
) -> None:
    """Room for 320 tokens, half a block each less: 304, which are there after 30 steps."""
    outlook = DeviceOutlook([make("a", 100, 100)], None, 20, BLOCK_SIZE, least_steps)
    assert outlook.admit(make("b", 144, 100)) is admits
