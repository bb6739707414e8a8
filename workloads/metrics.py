"""Figures of a run, with the definitions and the JSON keys of `vllm bench serve`.

TTFT is the time from sending a request to its first token, E2EL that to its last, TPOT
(E2EL - TTFT) / (output tokens - 1), ITL the time between two pieces of the answer. Only requests
that completed enter them; failed ones are counted. Throughput divides by the whole duration.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workloads.metrics_config import MetricsConfig
from workloads.records import RequestRecord, RunRecord

METRICS = ("ttft", "tpot", "itl", "e2el")
PER_TOKEN_DIVISOR = "output tokens"


def compute_metrics(run: RunRecord, config: MetricsConfig) -> dict[str, Any]:
    """Return a run's figures, ready for a result file."""
    done = [request for request in run.requests if request.completed]
    total_input = sum(request.num_prompt_tokens for request in done)
    total_output = sum(request.num_output_tokens for request in done)
    seconds = run.duration_s

    def rate(count: float) -> float:
        return count / seconds if seconds > 0 else 0.0

    figures: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(run.requests) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": rate(len(done)),
        "request_goodput": rate(_num_good(done, config.goodput)) if config.goodput else None,
        "output_throughput": rate(total_output),
        "total_token_throughput": rate(total_input + total_output),
        "max_concurrent_requests": max_concurrent(done),
    }
    for name, values in _samples(done).items():
        figures |= _summary(name, values, config.metric_percentiles)
    per_token = [r.e2el_s / r.num_output_tokens for r in done if r.num_output_tokens]
    figures |= _summary("per_token_latency", per_token, config.metric_percentiles)
    figures["per_token_latency_divisor"] = PER_TOKEN_DIVISOR
    figures["error_counts"] = _error_counts(run.requests)
    if config.save_detailed:
        figures |= _details(run.requests)
    return figures


def max_concurrent(done: Sequence[RequestRecord]) -> int:
    """Return the most requests that were under way at once."""
    events = [(r.start_s, 1) for r in done] + [(r.start_s + r.e2el_s, -1) for r in done]
    most = now = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


def percentile_key(percentile: float) -> str:
    """Return the prefix of a percentile's key: p99, p99.9."""
    return f"p{int(percentile) if percentile == int(percentile) else percentile}"


def _samples(done: Sequence[RequestRecord]) -> dict[str, list[float]]:
    return {
        "ttft": [request.ttft_s for request in done],
        "tpot": [tpot for request in done if (tpot := request.tpot_s) is not None],
        "itl": [gap for request in done for gap in request.itls_s],
        "e2el": [request.e2el_s for request in done],
    }


def _summary(
    name: str, values_s: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float | None]:
    """Return mean, median, standard deviation and percentiles in ms; None without a value."""
    values = np.asarray(values_s, dtype=float) * 1e3
    empty = len(values) == 0
    figures: dict[str, float | None] = {
        f"mean_{name}_ms": None if empty else float(values.mean()),
        f"median_{name}_ms": None if empty else float(np.median(values)),
        f"std_{name}_ms": None if empty else float(values.std()),
    }
    for percentile in percentiles:
        found = None if empty else float(np.percentile(values, percentile))
        figures[f"{percentile_key(percentile)}_{name}_ms"] = found
    return figures


def _num_good(done: Sequence[RequestRecord], limits_ms: Mapping[str, float]) -> int:
    """Count requests within all limits; a single token has a TPOT of 0, as vLLM counts it."""

    def is_good(request: RequestRecord) -> bool:
        values = {
            "ttft": request.ttft_s,
            "tpot": request.tpot_s or 0.0,
            "e2el": request.e2el_s,
        }
        return all(values[name] * 1e3 <= limit for name, limit in limits_ms.items())

    return sum(is_good(request) for request in done)


def _error_counts(requests: Sequence[RequestRecord]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for request in requests:
        if not request.completed:
            message = request.error or "no answer"
            counts[message] = counts.get(message, 0) + 1
    return counts


def _details(requests: Sequence[RequestRecord]) -> dict[str, Any]:
    return {
        "input_lens": [r.num_prompt_tokens for r in requests],
        "output_lens": [r.num_output_tokens for r in requests],
        "start_times": [r.start_s for r in requests],
        "ttfts": [r.ttft_s if r.token_times_s else 0.0 for r in requests],
        "itls": [r.itls_s for r in requests],
        "generated_texts": [r.text for r in requests],
        "errors": [r.error or "" for r in requests],
    }
