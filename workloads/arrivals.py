"""When requests arrive."""

import math
import random
from dataclasses import dataclass

from engine.errors import ConfigError

RAMPS = ("linear", "exponential")
_SLOWEST_RATE = 0.1
"""A ramp that starts at 0 requests/s starts at this instead, so that something ever arrives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalConfig:
    """How requests are spread over time; names and meanings are `vllm bench serve`'s.

    Args:
        request_rate: Requests a second; infinite sends all at once.
        burstiness: Shape of the gamma-distributed gaps: 1 is a Poisson process, less comes in
            bursts, more is more even, infinite is constant.
        ramp_up_strategy: One of `RAMPS`, to change the rate from the first request to the last.
        ramp_up_start_rps: Rate at the first request.
        ramp_up_end_rps: Rate at the last.
        seed: The same seed gives the same arrivals.

    Raises:
        ConfigError: A value is out of range, or a ramp lacks a rate.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.ramp_up_strategy is None:
            return
        if self.ramp_up_strategy not in RAMPS:
            raise ConfigError(
                f"ramp_up_strategy must be one of {', '.join(RAMPS)}, got {self.ramp_up_strategy}"
            )
        start, end = self.ramp_up_start_rps, self.ramp_up_end_rps
        if start is None or end is None or start < 0 or not end > 0:
            raise ConfigError(
                "a ramp needs --ramp-up-start-rps of at least 0 and --ramp-up-end-rps above 0, "
                f"got {start} and {end}"
            )
        if math.isfinite(self.request_rate):
            raise ConfigError("a ramp sets the request rate: leave --request-rate out")
        if self.ramp_up_strategy == "exponential" and start == 0:
            raise ConfigError("an exponential ramp needs --ramp-up-start-rps above 0, got 0")


def arrival_times(config: ArrivalConfig, num_requests: int) -> list[float]:
    """Return when each request arrives, in seconds, in order.

    Without a ramp the times are scaled so that the whole takes num_requests / request_rate
    exactly, as `vllm bench serve` does: the offered rate is then the asked one, whatever the seed.
    """
    if config.ramp_up_strategy is None and math.isinf(config.request_rate):
        return [0.0] * num_requests
    rng = random.Random(config.seed)
    times: list[float] = []
    now = 0.0
    for index in range(num_requests):
        now += _gap_s(_rate_at(config, index, num_requests), config.burstiness, rng)
        times.append(now)
    if config.ramp_up_strategy is None:
        factor = num_requests / config.request_rate / now
        return [time * factor for time in times]
    return times


def _rate_at(config: ArrivalConfig, index: int, num_requests: int) -> float:
    start, end = config.ramp_up_start_rps, config.ramp_up_end_rps
    if config.ramp_up_strategy is None or start is None or end is None:
        return config.request_rate
    progress = index / max(1, num_requests - 1)
    if config.ramp_up_strategy == "linear":
        return max(_SLOWEST_RATE, start + (end - start) * progress)
    return float(start * (end / start) ** progress)


def _gap_s(rate: float, burstiness: float, rng: random.Random) -> float:
    if math.isinf(burstiness):
        return 1 / rate
    return rng.gammavariate(burstiness, 1 / (rate * burstiness))
