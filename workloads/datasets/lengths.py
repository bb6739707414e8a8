"""Data sets of lengths alone: drawn from a distribution, or read from a list."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

from workloads.datasets.sample import Sample, broken, positive_int, read_json

DEFAULT_OUTPUT_LEN = 100

# Lengths of the 2,000 requests that the NEO paper (arXiv 2411.01142) was evaluated with: OpenAI's
# summarization comparisons through Llama 2's tokenizer, as the paper's repository published them.
_QUANTILES = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
_PROMPT_TOKENS = (29, 174, 201, 233, 290, 371, 459, 514, 536, 555, 589)
_OUTPUT_TOKENS = (15, 25, 33, 35, 39, 45, 51, 56, 59, 65, 129)
_CORRELATION = 0.115
_TAIL = 5
"""Exponent that gives the tails beyond 1 and 99 % the published standard deviations."""
SUMMARIZE_SOURCE = (
    "summarize: lengths drawn from the quantiles of the 2,000 requests that the NEO paper's "
    "evaluation published (OpenAI summarization comparisons, Llama 2 tokenizer); prompts are "
    "random tokens; --dataset-path CarperAI/openai_summarize_comparisons takes the data itself"
)


def synthetic_lengths(
    num_requests: int,
    input_len: int,
    output_len: int | None,
    range_ratio: float,
    rng: random.Random,
) -> list[Sample]:
    """Return lengths uniform around their means (the NEO paper, figure 10a)."""

    def around(mean: int) -> int:
        low, high = round((1 - range_ratio) * mean), round((1 + range_ratio) * mean)
        return max(1, rng.randint(low, high))

    return [
        Sample(around(input_len), around(output_len or DEFAULT_OUTPUT_LEN))
        for _ in range(num_requests)
    ]


def summarize_lengths(num_requests: int, rng: random.Random) -> list[Sample]:
    """Return lengths with the distribution and the correlation of the summarize workload."""
    normal = NormalDist()
    samples = []
    for _ in range(num_requests):
        a, b = rng.gauss(0, 1), rng.gauss(0, 1)
        b = _CORRELATION * a + (1 - _CORRELATION**2) ** 0.5 * b
        prompt, output = (
            _at_quantile(values, normal.cdf(z))
            for values, z in ((_PROMPT_TOKENS, a), (_OUTPUT_TOKENS, b))
        )
        samples.append(Sample(prompt, output))
    return samples


def _at_quantile(values: Sequence[int], quantile: float) -> int:
    """Interpolate, with tails that thin out towards the one extreme value at their ends."""
    right = min(bisect_right(_QUANTILES, quantile), len(values) - 1)
    q0, q1 = _QUANTILES[right - 1], _QUANTILES[right]
    share = (quantile - q0) / (q1 - q0)
    if right == len(values) - 1:
        share = share**_TAIL
    elif right == 1:
        share = 1 - (1 - share) ** _TAIL
    return round(values[right - 1] + share * (values[right] - values[right - 1]))


def read_lengths(path: Path) -> list[Sample]:
    """Read a JSON list of [prompt tokens, output tokens].

    Raises:
        RequestError: The file is something else.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise broken(path, "expected a JSON list of [prompt tokens, output tokens]")
    samples = []
    for number, pair in enumerate(content):
        if not isinstance(pair, list) or len(pair) != 2:
            raise broken(
                path, f"entry {number}: expected [prompt tokens, output tokens], got {pair!r}"
            )
        prompt, output = (positive_int(value, path, f"entry {number}") for value in pair)
        samples.append(Sample(prompt, output))
    return samples
