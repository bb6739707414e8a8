"""The sampler against a slow and obvious oracle in plain Python."""

import itertools
import math
import random

import pytest
import torch

from engine import sampler
from engine.request import Request
from engine.sampler import sample, uniform
from engine.sampling_params import SamplingParams

VOCAB_SIZE = 12
EOS = 3


def make_request(output: tuple[int, ...] = (), seed: int = 0, prompt=(0, 1), **params) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=list(prompt),
        params=SamplingParams(**params),
        max_total_tokens=1000,
        eos_token_ids=frozenset({EOS}),
        output_token_ids=list(output),
        seed=seed,
    )


def make_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def oracle_distribution(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Return each allowed token's probability, by the definitions."""
    scaled = [x / params.temperature for x in logits]
    top = max(scaled)
    weights = {i: math.exp(x - top) for i, x in enumerate(scaled)}
    ranked = sorted(weights, key=lambda i: (-weights[i], i))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total = sum(weights[i] for i in ranked)
    allowed, reached = [], 0.0
    for i in ranked:
        if reached >= params.top_p:
            break
        reached += weights[i] / total
        if weights[i] >= params.min_p * weights[ranked[0]]:
            allowed.append(i)
    total = sum(weights[i] for i in allowed)
    return {i: weights[i] / total for i in allowed}


TRUNCATIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 400},
    {"top_k": -1},
    {"top_p": 0.05},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
]


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_frequencies_follow_the_oracle(options) -> None:
    num_draws = 6000
    row = make_logits(1, seed=5)
    params = SamplingParams(**options)
    expected = oracle_distribution(row[0].tolist(), params)
    requests = [make_request(seed=seed, **options) for seed in range(num_draws)]
    drawn = sample(row.repeat(num_draws, 1), requests).token_ids
    counts = [drawn.count(token) for token in range(VOCAB_SIZE)]
    assert {token for token in range(VOCAB_SIZE) if counts[token]} <= set(expected)
    # Six standard deviations and a bit: seeds are fixed, so this never flakes.
    for token, probability in expected.items():
        deviation = math.sqrt(num_draws * probability * (1 - probability))
        assert abs(counts[token] - num_draws * probability) <= 6 * deviation + 6


def test_one_batch_mixes_all_kinds() -> None:
    logits = make_logits(len(TRUNCATIONS) + 1, seed=9)
    requests = [make_request(seed=i, **options) for i, options in enumerate(TRUNCATIONS)]
    requests.append(make_request(temperature=0.0))
    tokens = sample(logits.clone(), requests).token_ids
    for row, options in enumerate(TRUNCATIONS):
        allowed = oracle_distribution(logits[row].tolist(), SamplingParams(**options))
        assert tokens[row] in allowed
    assert tokens[-1] == int(logits[-1].argmax())


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    logits = make_logits(1, seed=2)
    expected = oracle_distribution(logits[0].tolist(), SamplingParams())
    for seed in range(200):
        target, reached = uniform(seed, 0), 0.0
        for wanted in sorted(expected, key=lambda i: (-expected[i], i)):
            reached += expected[wanted]
            if reached > target:
                break
        assert sample(logits.clone(), [make_request(seed=seed)]).token_ids == [wanted]


def test_greedy_takes_the_maximum_and_ignores_truncation() -> None:
    logits = make_logits(4)
    requests = [make_request(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5) for _ in range(4)]
    assert sample(logits.clone(), requests).token_ids == logits.argmax(-1).tolist()


def test_logits_of_inference_mode_can_be_adjusted() -> None:
    with torch.inference_mode():
        logits = make_logits(1)
    biased = make_request(temperature=0.0, logit_bias={5: 100.0}, presence_penalty=0.5)
    assert sample(logits, [biased]).token_ids == [5]


def test_empty_batch() -> None:
    assert sample(torch.empty(0, VOCAB_SIZE), []).token_ids == []


@pytest.mark.parametrize("temperature", [1e-9, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = make_logits(1)
    drawn = sample(logits.clone(), [make_request(temperature=temperature)]).token_ids
    assert drawn == logits.argmax(-1).tolist()


def test_a_draw_near_one_takes_an_allowed_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, index: 1 - 2**-53)
    for seed in range(50):
        logits = make_logits(1, seed)
        allowed = oracle_distribution(logits[0].tolist(), SamplingParams(top_k=3))
        assert sample(logits.clone(), [make_request(top_k=3)]).token_ids[0] == list(allowed)[-1]


def test_seeded_draws_do_not_depend_on_the_batch() -> None:
    logits = make_logits(30, seed=1)
    requests = [make_request(output=(4,) * i, seed=i, top_p=0.9) for i in range(30)]
    alone = [sample(logits[i : i + 1].clone(), [requests[i]]).token_ids[0] for i in range(30)]
    together = sample(logits.clone(), requests).token_ids
    order = random.Random(3).sample(range(30), 30)
    shuffled = sample(logits[order].clone(), [requests[i] for i in order]).token_ids
    assert together == alone
    assert shuffled == [alone[i] for i in order]


@pytest.mark.parametrize("repetition", [1.0, 0.7, 1.8])
@pytest.mark.parametrize(("presence", "frequency"), [(0.0, 0.0), (0.5, 0.0), (0.4, -0.3)])
def test_penalties_follow_their_formulas(repetition, presence, frequency) -> None:
    prompt, output = (0, 1, 1), (2, 2, 2, 1, 7)
    request = make_request(
        output=output,
        prompt=prompt,
        temperature=0.0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    logits = make_logits(1, seed=4)
    expected = logits[0].tolist()
    for token in range(VOCAB_SIZE):
        if token in prompt + output:
            up = expected[token] > 0
            expected[token] *= 1 / repetition if up else repetition
        expected[token] -= output.count(token) * frequency + (token in output) * presence
    sample(logits, [request])  # changes the logits in place
    torch.testing.assert_close(logits[0], torch.tensor(expected))


def test_penalties_touch_their_own_row_only() -> None:
    logits = make_logits(2, seed=4)
    before = logits.clone()
    sample(logits, [make_request(), make_request(output=(1,), presence_penalty=2.0)])
    assert torch.equal(logits[0], before[0])
    assert not torch.equal(logits[1], before[1])


def test_logit_bias_is_added() -> None:
    logits = make_logits(2)
    expected = logits.clone()
    expected[1, 5] += 100.0
    expected[1, 6] -= 1.5
    biased = make_request(temperature=0.0, logit_bias={5: 100.0, 6: -1.5})
    assert sample(logits, [make_request(temperature=0.0), biased]).token_ids[1] == 5
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_bans_what_would_stop(temperature: float) -> None:
    params = {"temperature": temperature, "stop_token_ids": [5, 9999], "min_tokens": 2}
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, EOS] = logits[0, 5] = 50.0
    early = [make_request(output=(0,), seed=seed, **params) for seed in range(100)]
    assert not {EOS, 5} & set(sample(logits.repeat(100, 1), early).token_ids)
    late = [make_request(output=(0, 0), seed=seed, **params) for seed in range(100)]
    assert set(sample(logits.repeat(100, 1), late).token_ids) <= {EOS, 5}
    ignoring = make_request(ignore_eos=True, temperature=0.0, min_tokens=2, stop_token_ids=[5])
    assert sample(logits.clone(), [ignoring]).token_ids == [EOS]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = make_logits(3, seed=6)
    expected = logits.log_softmax(-1)
    requests = [
        make_request(temperature=2.0, seed=1, logprobs=4, logit_bias={2: 50.0}),
        make_request(temperature=0.0),
        make_request(temperature=0.0, logprobs=0, output=(1,), presence_penalty=1.0),
    ]
    sampled = sample(logits, requests)
    assert sampled.logprobs[1] is None
    for row, num_top in ((0, 4), (2, 0)):
        found = sampled.logprobs[row]
        token = sampled.token_ids[row]
        assert found.token_id == token
        assert found.logprob == pytest.approx(expected[row, token].item())
        ranking = expected[row].argsort(descending=True).tolist()
        assert found.rank == ranking.index(token) + 1
        assert [i for i, _ in found.top] == ranking[:num_top]
        assert [p for _, p in found.top] == pytest.approx(
            [expected[row, i].item() for i in ranking[:num_top]]
        )
    assert sampled.token_ids[0] == 2


def test_more_logprobs_than_tokens() -> None:
    [found] = sample(make_logits(1), [make_request(logprobs=20)]).logprobs
    assert len(found.top) == VOCAB_SIZE


def test_uniform_is_stable() -> None:
    assert [uniform(0, 0), uniform(1, 0), uniform(-1, 7)] == [
        0.6524484863740322,
        0.36818951565166946,
        0.10134950925237729,
    ]


@pytest.mark.parametrize("by", ["seed", "index"])
def test_uniform_looks_uniform(by: str) -> None:
    num_draws, num_bins = 20_000, 50
    draws = [uniform(i, 3) if by == "seed" else uniform(3, i) for i in range(num_draws)]
    assert all(0 <= u < 1 for u in draws)
    counts = [0] * num_bins
    for u in draws:
        counts[int(u * num_bins)] += 1
    mean = num_draws / num_bins
    chi_square = sum((count - mean) ** 2 / mean for count in counts)
    assert chi_square < num_bins - 1 + 5 * math.sqrt(2 * (num_bins - 1))
    pairs = list(itertools.pairwise(draws))
    correlation = sum((a - 0.5) * (b - 0.5) for a, b in pairs) / len(pairs) * 12
    assert abs(correlation) < 5 / math.sqrt(num_draws)
