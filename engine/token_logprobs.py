"""Log-probabilities as they leave the sampler; plain numbers, for those who compute nothing too."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, before penalties, bias, temperature or truncation.

    Args:
        token_id: The sampled token.
        logprob: Its log-probability.
        rank: Its rank among all tokens, 1 is the likeliest.
        top: The likeliest tokens and their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]
