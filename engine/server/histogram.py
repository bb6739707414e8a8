"""Histograms that cost little to fill: a bisection and two additions an observation."""

from bisect import bisect_left
from collections.abc import Sequence

LATENCY_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICE_BUCKETS = (1, 2, 5, 10, 20)


def one_two_five(largest: int) -> tuple[int, ...]:
    """Return 1, 2, 5, 10, 20, 50, ... up to `largest`."""
    buckets: list[int] = []
    power = 1
    while power <= largest:
        buckets += [power * factor for factor in (1, 2, 5) if power * factor <= largest]
        power *= 10
    return tuple(buckets)


class Histogram:
    """Counts values in buckets.

    Args:
        bounds: Largest value of each bucket, rising; what is larger counts in a last one.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.total = 0.0
        """Sum of all values."""

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return the upper bound of each bucket, as text, and how many values are within it."""
        buckets = []
        count = 0
        for bound, number in zip((*self._bounds, float("inf")), self._counts, strict=True):
            count += number
            buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(count)))
        return buckets
