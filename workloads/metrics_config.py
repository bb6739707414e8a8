"""Which figures of a run to compute; apart from the arithmetic, so that options load quickly."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError

GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Which figures to compute.

    Args:
        metric_percentiles: Percentiles of each metric, each in (0, 100].
        goodput: Milliseconds by metric, one of `GOODPUT_METRICS`: a request is good if it keeps
            all of them.
        save_detailed: Keep every request's lengths and times, too.

    Raises:
        ConfigError: A percentile or a limit is out of range, or a metric unknown.
    """

    metric_percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float] | None = None
    save_detailed: bool = False

    def __post_init__(self) -> None:
        for value in self.metric_percentiles:
            if not 0 < value <= 100:
                raise ConfigError(
                    f"metric_percentiles must be above 0 and at most 100, got {value}"
                )
        for name, limit in (self.goodput or {}).items():
            if name not in GOODPUT_METRICS or not limit > 0:
                raise ConfigError(
                    f"goodput must be METRIC:MILLISECONDS with a metric of "
                    f"{', '.join(GOODPUT_METRICS)} and a limit above 0, got {name}:{limit}"
                )
