"""How a request ends, and which of its tokens lie where."""

import pytest

from engine.request import FinishReason, Request
from engine.sampling_params import SamplingParams

EOS = 1


def make(num_prompt: int = 3, max_total: int = 100, **params) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=list(range(10, 10 + num_prompt)),
        params=SamplingParams(**params),
        max_total_tokens=max_total,
        eos_token_ids=frozenset({EOS}),
    )


def feed(request: Request, tokens: list[int]) -> tuple[FinishReason | None, int | str | None]:
    for token in tokens:
        assert not request.is_finished
        request.append_token(token)
    return request.finish_reason, request.stop_reason


@pytest.mark.parametrize(
    ("params", "tokens", "expected"),
    [
        ({"max_tokens": 3}, [5, 5], (None, None)),
        ({"max_tokens": 3}, [5, 5, 5], (FinishReason.LENGTH, None)),
        ({"max_tokens": 3}, [5, EOS], (FinishReason.STOP, None)),
        ({"max_tokens": 3, "ignore_eos": True}, [5, EOS], (None, None)),
        ({"stop_token_ids": [7]}, [5, 7], (FinishReason.STOP, 7)),
        ({"stop_token_ids": [7], "ignore_eos": True}, [EOS, 7], (FinishReason.STOP, 7)),
        ({"stop_token_ids": [EOS]}, [EOS], (FinishReason.STOP, EOS)),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [EOS], (FinishReason.STOP, EOS)),
        ({"min_tokens": 3}, [EOS, EOS], (None, None)),
        ({"min_tokens": 2}, [EOS, EOS], (FinishReason.STOP, None)),
        ({"max_tokens": 2}, [5, EOS], (FinishReason.STOP, None)),
    ],
)
def test_conditions_that_end_it(params, tokens, expected) -> None:
    assert feed(make(**params), tokens) == expected


def test_the_context_limits_the_output() -> None:
    request = make(num_prompt=3, max_total=5, max_tokens=None)
    assert request.max_new_tokens == 2
    assert feed(request, [5, 5]) == (FinishReason.LENGTH, None)


def test_token_ids_span_prompt_and_output() -> None:
    request = make(num_prompt=3)
    request.output_token_ids = [20, 21, 22]
    everything = [10, 11, 12, 20, 21, 22]
    for start in range(7):
        for end in range(start, 7):
            assert request.token_ids(start, end) == everything[start:end]
