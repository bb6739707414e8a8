"""Rates and percentiles of the last seconds, for the dashboard and for Retry-After."""

import time
from collections import deque
from collections.abc import Iterable

WINDOW_S = 30.0
"""What counts as recent for percentiles."""

RATE_WINDOW_S = 10
"""Whole seconds over which rates are taken."""

_MAX_VALUES = 2048


class Recent:
    """What happened in the last seconds; times are monotonic."""

    def __init__(self) -> None:
        self._tokens: deque[tuple[int, int]] = deque(maxlen=RATE_WINDOW_S + 2)
        self._finishes: deque[float] = deque(maxlen=_MAX_VALUES)
        self._ttft: deque[tuple[float, float]] = deque(maxlen=_MAX_VALUES)
        self._tpot: deque[tuple[float, float]] = deque(maxlen=_MAX_VALUES)

    def add_tokens(self, time_s: float, count: int) -> None:
        """Count generated tokens."""
        second = int(time_s)
        if self._tokens and self._tokens[-1][0] == second:
            count += self._tokens.pop()[1]
        self._tokens.append((second, count))

    def add_finish(self, time_s: float) -> None:
        """Count a request that ended."""
        self._finishes.append(time_s)

    def add_ttft(self, time_s: float, value_s: float) -> None:
        """Note a time to the first token."""
        self._ttft.append((time_s, value_s))

    def add_tpot(self, time_s: float, value_s: float) -> None:
        """Note a finished request's mean time per output token."""
        self._tpot.append((time_s, value_s))

    def tokens_per_s(self) -> float:
        """Return the generated tokens per second over the last whole seconds."""
        now = int(time.monotonic())
        counts = [count for second, count in self._tokens if now - RATE_WINDOW_S <= second < now]
        return sum(counts) / RATE_WINDOW_S

    def finished_per_s(self) -> float:
        """Return the requests per second that ended lately."""
        since = time.monotonic() - WINDOW_S
        return sum(at >= since for at in self._finishes) / WINDOW_S

    def ttft_percentiles_s(self) -> dict[str, float] | None:
        """Return the median, 90th and 99th percentile; None if there was nothing."""
        return _percentiles(self._ttft)

    def tpot_percentiles_s(self) -> dict[str, float] | None:
        """Return the median, 90th and 99th percentile; None if there was nothing."""
        return _percentiles(self._tpot)


def _percentiles(entries: Iterable[tuple[float, float]]) -> dict[str, float] | None:
    since = time.monotonic() - WINDOW_S
    values = sorted(value for at, value in entries if at >= since)
    if not values:
        return None
    return {
        f"p{percent}": values[min(len(values) - 1, len(values) * percent // 100)]
        for percent in (50, 90, 99)
    }
