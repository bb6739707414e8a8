"""What a benchmark measures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.errors import ConfigError
from workloads.arrivals import ArrivalConfig
from workloads.datasets import DatasetConfig
from workloads.metrics_config import MetricsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Options of a sweep; those that `vllm bench serve` has carry its names.

    Args:
        dataset: The workload.
        arrivals: How it is spread over time; its rate is that of each point.
        request_rates: Requests a second of the points.
        output_lens: Output lengths of the points; empty for the data set's own.
        use_trace_arrivals: Requests come when their trace says, and rates are left out.
        max_concurrency: Most requests under way at once.
        num_warmups: Requests that are sent before the first point of a system and not counted.
        repeats: Measurements of each point. Each takes another seed; systems take turns.
        metrics: Which figures.
        result_dir: Where result files go.
        overwrite: Measure points again that are there already.
        label: Name of the results, in place of the system's.
        metadata: Kept in the result files.

    Raises:
        ConfigError: A value is out of range, or options contradict each other.
    """

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    arrivals: ArrivalConfig = field(default_factory=ArrivalConfig)
    request_rates: tuple[float, ...] = (math.inf,)
    output_lens: tuple[int, ...] = ()
    use_trace_arrivals: bool = False
    max_concurrency: int | None = None
    num_warmups: int = 8
    repeats: int = 1
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    result_dir: Path = Path("bench-results")
    overwrite: bool = False
    label: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.request_rates:
            raise ConfigError("request_rate needs at least one rate, got none")
        for rate in self.request_rates:
            replace(self.arrivals, request_rate=rate)  # checks it
        for length in self.output_lens:
            replace(self.dataset, output_len=length)
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"max_concurrency must be at least 1, got {self.max_concurrency}")
        if self.num_warmups < 0:
            raise ConfigError(f"num_warmups must be at least 0, got {self.num_warmups}")
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}")
        has_rates = self.request_rates != (math.inf,) or self.arrivals.ramp_up_strategy
        if self.use_trace_arrivals and has_rates:
            raise ConfigError("--use-trace-arrivals takes the trace's times: leave rates out")
