"""One cell of a sweep, and the file that holds its result."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from workloads.arrivals import ArrivalConfig
from workloads.bench.config import BenchConfig
from workloads.datasets import DatasetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A system at a load, once.

    Args:
        request_rate: Requests a second.
        output_len: Wanted output length; None is the data set's own.
        repeat: Which measurement, from 0 on.
    """

    request_rate: float
    output_len: int | None
    repeat: int

    def dataset(self, config: BenchConfig) -> DatasetConfig:
        """Return the workload; each repeat draws another one, the same for all systems."""
        output_len = self.output_len or config.dataset.output_len
        return replace(
            config.dataset, output_len=output_len, seed=config.dataset.seed + self.repeat
        )

    def arrivals(self, config: BenchConfig) -> ArrivalConfig:
        """Return how it arrives."""
        return replace(
            config.arrivals,
            request_rate=self.request_rate,
            seed=config.arrivals.seed + self.repeat,
        )


def points_of(config: BenchConfig, repeat: int) -> list[Point]:
    """Return the points of one repeat."""
    return [
        Point(request_rate=rate, output_len=length, repeat=repeat)
        for length in config.output_lens or (None,)
        for rate in config.request_rates
    ]


def rate_text(rate: float) -> str:
    """Return a rate for files and tables."""
    return "inf" if math.isinf(rate) else f"{rate:g}"


def file_stem(label: str, point: Point, config: BenchConfig, facts: dict[str, Any]) -> str:
    """Return the name of a point's result file, without ending.

    It says what the point is, and ends with a digest of everything that it depends on, so that a
    sweep finds its own points again and no others.
    """
    what = {
        "point": asdict(point),
        "dataset": asdict(point.dataset(config)),
        "arrivals": asdict(point.arrivals(config)),
        "trace": config.use_trace_arrivals,
        "max_concurrency": config.max_concurrency,
        "system": facts,
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:8]
    parts = [label, config.dataset.name]
    if point.output_len is not None:
        parts.append(f"{point.output_len}out")
    parts += [f"{rate_text(point.request_rate)}qps", f"r{point.repeat}", digest]
    return re.sub(r"[^\w.-]+", "_", "-".join(parts))
