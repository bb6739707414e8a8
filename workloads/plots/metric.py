"""Names of metrics on axes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import ConfigError

DEFAULT_LATENCY = "mean_per_token_latency_ms"
_QUANTITIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
    "per_token_latency": "end-to-end latency / output tokens",
}
_KEY = re.compile(r"(?P<kind>mean|median|std|p[\d.]+)_(?P<name>\w+)_ms")


def axis_label(metric: str) -> str:
    """Return the text of an axis for a metric's key."""
    found = _KEY.fullmatch(metric)
    if found is None:
        return metric.replace("_", " ")
    kind, name = found["kind"], found["name"]
    return f"{kind} {_QUANTITIES.get(name, name.replace('_', ' '))}, ms"


def check_metric(results: Iterable[Mapping[str, Any]], metric: str) -> None:
    """Check that some result has a metric.

    Raises:
        ConfigError: None has; the message names those that there are.
    """
    listed = list(results)
    if any(isinstance(result.get(metric), int | float) for result in listed):
        return
    known = sorted(
        {key for r in listed for key in r if key.endswith("_ms") or key.endswith("throughput")}
    )
    raise ConfigError(f"no result has the metric {metric}; there are {', '.join(known)}")
