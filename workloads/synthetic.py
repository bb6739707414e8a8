"""Synthetic workloads: random tokens, lengths uniform around a mean (the NEO paper, figure 10a)."""

import random
from dataclasses import dataclass

SPREAD = 0.1
"""Lengths are uniform in [(1 - SPREAD) * mean, (1 + SPREAD) * mean]."""


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request: its prompt's tokens and how many it generates."""

    prompt_token_ids: list[int]
    num_output_tokens: int


def synthetic_workload(
    num_requests: int, input_len: int, output_len: int, vocab_size: int, seed: int
) -> list[WorkloadRequest]:
    """Return reproducible requests with random prompts.

    Args:
        num_requests: How many.
        input_len: Mean prompt length in tokens.
        output_len: Mean output length in tokens.
        vocab_size: Prompt tokens are drawn from all but the first few, which are often special.
        seed: The same seed gives the same requests.
    """
    rng = random.Random(seed)

    def around(mean: int) -> int:
        return rng.randint(round((1 - SPREAD) * mean), round((1 + SPREAD) * mean))

    return [
        WorkloadRequest(
            rng.choices(range(min(10, vocab_size - 1), vocab_size), k=around(input_len)),
            around(output_len),
        )
        for _ in range(num_requests)
    ]
