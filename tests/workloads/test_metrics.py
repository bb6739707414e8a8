"""Metric arithmetic on timelines small enough to check by hand."""

import pytest

from engine.errors import ConfigError
from workloads.metrics import compute_metrics, percentile_key
from workloads.metrics_config import MetricsConfig
from workloads.records import RequestRecord, RunRecord


def record(start: float, *times: float, tokens: int | None = None, **options) -> RequestRecord:
    return RequestRecord(
        num_prompt_tokens=options.pop("prompt", 10),
        wanted_output_tokens=len(times),
        start_s=start,
        token_times_s=list(times),
        num_output_tokens=len(times) if tokens is None else tokens,
        end_s=options.pop("end", times[-1] if times else None),
        **options,
    )


@pytest.fixture
def run() -> RunRecord:
    """Two answers and a failure: TTFT 1 and 2 s, ITL 0.5 0.5 and 1, in 5 seconds."""
    return RunRecord(
        requests=[
            record(0.0, 1.0, 1.5, 2.0),
            record(1.0, 3.0, 4.0, prompt=20),
            record(2.0, 2.5, error="connection lost"),
        ],
        duration_s=5.0,
    )


def test_counts_and_rates(run: RunRecord) -> None:
    figures = compute_metrics(run, MetricsConfig())
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (30, 5)
    assert figures["request_throughput"] == pytest.approx(0.4)
    assert figures["output_throughput"] == pytest.approx(1.0)
    assert figures["total_token_throughput"] == pytest.approx(7.0)
    assert figures["request_goodput"] is None
    assert figures["error_counts"] == {"connection lost": 1}
    assert figures["max_concurrent_requests"] == 2


def test_latencies(run: RunRecord) -> None:
    figures = compute_metrics(run, MetricsConfig(metric_percentiles=(50.0, 99.9)))
    assert figures["mean_ttft_ms"] == pytest.approx(1500)
    assert figures["std_ttft_ms"] == pytest.approx(500)
    assert figures["p50_ttft_ms"] == figures["median_ttft_ms"] == pytest.approx(1500)
    assert figures["p99.9_ttft_ms"] == pytest.approx(1999)
    assert figures["mean_tpot_ms"] == pytest.approx((500 + 1000) / 2)
    assert figures["mean_itl_ms"] == pytest.approx(2000 / 3)
    assert figures["mean_e2el_ms"] == pytest.approx(2500)
    # 2 s over 3 tokens and 3 s over 2
    assert figures["mean_per_token_latency_ms"] == pytest.approx((2000 / 3 + 1500) / 2)
    assert figures["per_token_latency_divisor"] == "output tokens"


def test_tpot_counts_tokens_and_itl_counts_pieces() -> None:
    """A server may send several tokens in one piece."""
    figures = compute_metrics(
        RunRecord(requests=[record(0.0, 1.0, 2.0, tokens=5)], duration_s=2.0), MetricsConfig()
    )
    assert figures["mean_tpot_ms"] == pytest.approx(250)
    assert figures["mean_itl_ms"] == pytest.approx(1000)


def test_a_single_token_has_no_tpot() -> None:
    figures = compute_metrics(
        RunRecord(requests=[record(0.0, 1.0)], duration_s=1.0),
        MetricsConfig(goodput={"tpot": 0.001}),
    )
    assert figures["mean_tpot_ms"] is figures["p99_itl_ms"] is None
    assert figures["request_goodput"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 1000.0}, 1),
        ({"ttft": 999.0}, 0),
        ({"ttft": 2000.0, "e2el": 3000.0}, 2),
        ({"ttft": 2000.0, "tpot": 600.0}, 1),
    ],
)
def test_goodput_needs_all_limits(run: RunRecord, limits: dict[str, float], good: int) -> None:
    figures = compute_metrics(run, MetricsConfig(goodput=limits))
    assert figures["request_goodput"] == pytest.approx(good / 5.0)


def test_a_run_of_failures_has_counts_and_no_latencies() -> None:
    lost = [record(0.0, error="refused"), record(0.0)]
    figures = compute_metrics(RunRecord(requests=lost, duration_s=1.0), MetricsConfig())
    assert (figures["completed"], figures["failed"]) == (0, 2)
    assert figures["mean_ttft_ms"] is None
    assert figures["error_counts"] == {"refused": 1, "no answer": 1}


def test_an_answer_that_was_cut_off_is_a_failure() -> None:
    run = RunRecord(requests=[record(0.0, 1.0, 2.0, error="closed")], duration_s=2.0)
    assert compute_metrics(run, MetricsConfig())["completed"] == 0


def test_details_keep_every_request(run: RunRecord) -> None:
    figures = compute_metrics(run, MetricsConfig(save_detailed=True))
    assert figures["ttfts"] == pytest.approx([1.0, 2.0, 0.5])
    assert figures["itls"] == [[0.5, 0.5], [1.0], []]
    assert figures["input_lens"] == [10, 20, 10]
    assert figures["errors"] == ["", "", "connection lost"]


def test_percentile_keys_are_vllms() -> None:
    assert [percentile_key(p) for p in (50.0, 99, 99.9)] == ["p50", "p99", "p99.9"]


@pytest.mark.parametrize(
    "options",
    [{"metric_percentiles": (0.0,)}, {"goodput": {"itl": 5.0}}, {"goodput": {"ttft": 0.0}}],
)
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ConfigError):
        MetricsConfig(**options)
