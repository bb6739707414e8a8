"""Sampling options: ranges, and the shapes in which vLLM users give them."""

import math

import pytest

from engine.errors import RequestError
from engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": math.nan},
        {"presence_penalty": 2.1},
        {"presence_penalty": -2.1},
        {"frequency_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": {1: math.nan}},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"stop_token_ids": [-1]},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": -1, "max_tokens": None},
        {"min_tokens": 17},
        {"logprobs": -1},
        {"logprobs": 21},
    ],
    ids=str,
)
def test_out_of_range_names_the_field(options) -> None:
    with pytest.raises(RequestError, match=f"^{next(iter(options))} must be .*, got "):
        SamplingParams(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_k": -1},
        {"top_p": 1.0},
        {"min_p": 1.0},
        {"presence_penalty": -2.0},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"logit_bias": {0: -100.0, 5: 100.0}},
        {"stop": ["x"] * 16},
        {"max_tokens": 1},
        {"min_tokens": 16},
        {"max_tokens": None, "min_tokens": 5000},
        {"logprobs": 0},
        {"logprobs": 20},
    ],
    ids=str,
)
def test_limits_themselves_are_allowed(options) -> None:
    SamplingParams(**options)


def test_one_stop_string_is_a_string_and_none_is_nothing() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    nothing = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None)
    assert nothing == SamplingParams()


def test_later_changes_of_a_caller_s_containers_do_not_matter() -> None:
    bias, ids = {1: 2.0}, [3]
    params = SamplingParams(logit_bias=bias, stop_token_ids=ids)
    bias[-5], ids[0] = 1e9, -1
    assert params.logit_bias == {1: 2.0}
    assert params.stop_token_ids == (3,)
