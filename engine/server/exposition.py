"""The metrics for Prometheus: vLLM's names and labels with the prefix `neo:`, and ours."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from engine.request import FinishReason
from engine.server.histogram import Histogram
from engine.server.service import Service, State
from engine.step_plan import StepMode

PREFIX = "neo:"
ENGINE_ID = "0"
_LABELS = ("model_name", "engine")
_ROW_KINDS = ("gdec", "gprf", "cprf", "cdec", "rotating")


class MetricsCollector(Collector):
    """Words the metrics whenever they are read.

    Args:
        service: The server's state.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what there is is only known when it is read."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return all metrics."""
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()
        yield from self._offloading()
        yield from self._http()

    @property
    def _values(self) -> tuple[str, str]:
        names = self._service.model_names
        return (names[0] if names else "", ENGINE_ID)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(
        self, name: str, text: str, value: float | Mapping[str, float], label: str | None = None
    ) -> Metric:
        labels = _LABELS if label is None else (*_LABELS, label)
        family = CounterMetricFamily(PREFIX + name, text, labels=labels)
        if isinstance(value, Mapping):
            for key, count in value.items():
                family.add_metric((*self._values, key), count)
        else:
            family.add_metric(self._values, value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=_LABELS)
        family.add_metric(self._values, histogram.cumulative(), histogram.total)
        return family

    def _gauges(self) -> Iterator[Metric]:
        service = self._service
        gauges = service.metrics.gauges
        yield self._gauge("num_requests_running", "Requests that hold KV.", gauges.num_running)
        yield self._gauge(
            "num_requests_running_host",
            "Of these, requests whose KV is on the host.",
            gauges.num_running_host,
        )
        yield self._gauge(
            "num_requests_waiting", "Requests that wait for room.", gauges.num_waiting
        )
        if service.is_open:
            ready = service.ready
            yield self._gauge(
                "kv_cache_usage_perc",
                "Used share of the device's KV blocks, 0 to 1.",
                gauges.num_device_used / ready.num_device_blocks,
            )
            yield self._gauge(
                "host_kv_cache_usage_perc",
                "Used share of the host's KV blocks, 0 to 1.",
                gauges.num_host_used / max(1, ready.num_host_blocks),
            )
            yield self._gauge("kv_blocks", "KV blocks of the device.", ready.num_device_blocks)
            yield self._gauge("host_kv_blocks", "KV blocks of the host.", ready.num_host_blocks)
        yield self._gauge(
            "ready", "1 while the server takes requests.", float(service.state is State.READY)
        )

    def _counters(self) -> Iterator[Metric]:
        metrics = self._service.metrics
        yield self._counter("prompt_tokens", "Prompt tokens of prompts.", metrics.prompt_tokens)
        yield self._counter("generation_tokens", "Generated tokens.", metrics.generation_tokens)
        yield self._counter("num_preemptions", "Preempted requests.", metrics.num_preemptions)
        finished = {reason.value: metrics.finished[reason.value] for reason in FinishReason}
        yield self._counter(
            "request_success", "Ended requests by reason.", finished, "finished_reason"
        )

    def _histograms(self) -> Iterator[Metric]:
        m = self._service.metrics
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", m.ttft_s),
            ("inter_token_latency_seconds", "Between tokens.", m.inter_token_s),
            (
                "request_time_per_output_token_seconds",
                "Mean time per output token of a request.",
                m.time_per_output_token_s,
            ),
            ("e2e_request_latency_seconds", "From arrival to the end.", m.e2e_s),
            ("request_queue_time_seconds", "Waiting for the first step.", m.queue_s),
            ("request_inference_time_seconds", "From first step to end.", m.inference_s),
            ("request_prefill_time_seconds", "From first step to first token.", m.prefill_s),
            ("request_decode_time_seconds", "From first to last token.", m.decode_s),
            ("request_prompt_tokens", "Prompt tokens of a request.", m.request_prompt_tokens),
            (
                "request_generation_tokens",
                "Generated tokens of a request.",
                m.request_generation_tokens,
            ),
            ("request_params_max_tokens", "max_tokens of a request.", m.request_max_tokens),
            ("request_params_n", "n of a request.", m.request_n),
            ("iteration_tokens_total", "Tokens of a step.", m.step_tokens),
        ):
            yield self._histogram(name, text, histogram)

    def _offloading(self) -> Iterator[Metric]:
        service = self._service
        metrics = service.metrics
        modes = {mode.value: metrics.steps_by_mode[mode.value] for mode in StepMode}
        rows = {kind: metrics.rows[kind] for kind in _ROW_KINDS}
        yield self._counter("steps", "Steps by mode.", modes, "mode")
        yield self._counter("failed_steps", "Steps that failed.", metrics.num_failed_steps)
        yield self._counter(
            "rows", "Rows by kind: tokens of prefills, requests of decodes.", rows, "kind"
        )
        yield self._counter(
            "graph_steps", "Steps that were launched as a graph.", metrics.num_graph_steps
        )
        yield self._counter("step_seconds", "Time in steps.", metrics.step_s)
        yield self._counter(
            "device_busy_seconds",
            "Time the device had work it could do; over step_seconds, its busy share.",
            metrics.device_busy_s,
        )
        yield self._counter(
            "cpu_attention_seconds",
            "Time the CPU spent on attention; over step_seconds, its busy share.",
            metrics.cpu_attention_s,
        )
        yield self._counter(
            "cpu_waiting_seconds",
            "Time the CPU was ready in pipelined steps without rows to attend to.",
            metrics.cpu_waiting_s,
        )
        for name, text, times in (
            ("predicted_seconds", "Predicted time by stage.", metrics.predicted_s),
            ("measured_seconds", "Measured time of the same steps by stage.", metrics.measured_s),
        ):
            yield self._counter(name, text, times, "stage")
        if service.is_open:
            size = service.ready.block_bytes
            swapped = {
                "out": metrics.swapped_out_blocks * size,
                "in": metrics.swapped_in_blocks * size,
            }
            yield self._counter(
                "swapped_bytes", "Bytes of KV moved between the pools.", swapped, "direction"
            )

    def _http(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            PREFIX + "http_responses", "Answers by route and status.", labels=("route", "status")
        )
        for (route, status), count in sorted(self._service.metrics.http_responses.items()):
            family.add_metric((route, str(status)), count)
        yield family
