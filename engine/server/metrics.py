"""What the server has seen, added up; `exposition` words it for Prometheus.

Everything is filled from the engine's reports in the HTTP process, on the way of every token, so it
costs little: no locks, no labels to look up.
"""

from collections import Counter
from dataclasses import dataclass

from engine.server.histogram import (
    CHOICE_BUCKETS,
    LATENCY_BUCKETS_S,
    STEP_TOKEN_BUCKETS,
    TOKEN_BUCKETS_S,
    TTFT_BUCKETS_S,
    Histogram,
    one_two_five,
)
from engine.server.recent import Recent
from engine.server.step_record import StepRecord
from engine.server.wire import Finish, Gauges, Report, TokenDelta

STAGES = ("step", "cpu_attention")
"""What is predicted and measured of a step."""

_LARGEST_LENGTH = 1_000_000


@dataclass(slots=True)
class RequestTrack:
    """What the metrics need to remember of a running request; times are monotonic."""

    arrival_s: float
    num_prompt_tokens: int
    max_tokens: int | None
    num_output_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0


class Metrics:
    """Totals, histograms and gauges since the server started."""

    def __init__(self) -> None:
        lengths = one_two_five(_LARGEST_LENGTH)
        self.gauges = Gauges(0, 0, 0, 0, 0)
        self.recent = Recent()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self.http_responses: Counter[tuple[str, int]] = Counter()
        self.ttft_s = Histogram(TTFT_BUCKETS_S)
        self.inter_token_s = Histogram(TOKEN_BUCKETS_S)
        self.time_per_output_token_s = Histogram(TOKEN_BUCKETS_S)
        self.e2e_s = Histogram(LATENCY_BUCKETS_S)
        self.queue_s = Histogram(LATENCY_BUCKETS_S)
        self.inference_s = Histogram(LATENCY_BUCKETS_S)
        self.prefill_s = Histogram(LATENCY_BUCKETS_S)
        self.decode_s = Histogram(LATENCY_BUCKETS_S)
        self.request_prompt_tokens = Histogram(lengths)
        self.request_generation_tokens = Histogram(lengths)
        self.request_max_tokens = Histogram(lengths)
        self.request_n = Histogram(CHOICE_BUCKETS)
        self.step_tokens = Histogram(STEP_TOKEN_BUCKETS)
        self.steps_by_mode: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.num_failed_steps = 0
        self.num_preemptions = 0
        self.swapped_out_blocks = 0
        self.swapped_in_blocks = 0
        self.num_graph_steps = 0
        self.step_s = 0.0
        self.device_busy_s = 0.0
        self.cpu_attention_s = 0.0
        self.cpu_waiting_s = 0.0
        self.predicted_s = dict.fromkeys(STAGES, 0.0)
        self.measured_s = dict.fromkeys(STAGES, 0.0)

    def observe_report(self, report: Report) -> None:
        """Count what a report says of the engine; its deltas come one by one."""
        self.gauges = report.gauges
        for step in report.steps:
            self._observe_step(step)

    def observe_delta(self, track: RequestTrack, delta: TokenDelta, time_s: float) -> None:
        """Count a delta.

        Args:
            track: Of its request.
            delta: What came.
            time_s: When the engine sent it.
        """
        num_tokens = len(delta.token_ids)
        if num_tokens:
            if track.num_output_tokens == 0:
                self.prompt_tokens += track.num_prompt_tokens
                track.first_token_s = time_s
                self.ttft_s.observe(time_s - track.arrival_s)
                self.recent.add_ttft(time_s, time_s - track.arrival_s)
            else:
                self.inter_token_s.observe((time_s - track.last_token_s) / num_tokens)
            track.last_token_s = time_s
            track.num_output_tokens += num_tokens
            self.generation_tokens += num_tokens
            self.recent.add_tokens(time_s, num_tokens)
        if delta.finish is not None:
            self._observe_finish(track, delta.finish, time_s)

    def _observe_finish(self, track: RequestTrack, finish: Finish, time_s: float) -> None:
        self.finished[finish.reason] += 1
        self.recent.add_finish(time_s)
        self.e2e_s.observe(time_s - track.arrival_s)
        self.request_prompt_tokens.observe(track.num_prompt_tokens)
        self.request_generation_tokens.observe(track.num_output_tokens)
        if track.max_tokens is not None:
            self.request_max_tokens.observe(track.max_tokens)
        started_s = None if finish.metrics is None else finish.metrics.first_scheduled_time_s
        if started_s is not None:
            self.queue_s.observe(started_s - track.arrival_s)
            self.inference_s.observe(time_s - started_s)
        if started_s is not None and track.num_output_tokens:
            decode_s = track.last_token_s - track.first_token_s
            self.prefill_s.observe(track.first_token_s - started_s)
            self.decode_s.observe(decode_s)
            if track.num_output_tokens > 1:
                tpot_s = decode_s / (track.num_output_tokens - 1)
                self.time_per_output_token_s.observe(tpot_s)
                self.recent.add_tpot(time_s, tpot_s)

    def _observe_step(self, step: StepRecord) -> None:
        if step.error is not None:
            self.num_failed_steps += 1
            return
        self.steps_by_mode[step.mode] += 1
        num_tokens = 0
        for rows in step.rows:
            num_tokens += sum(rows)
            for kind, count in zip(rows._fields, rows, strict=True):
                self.rows[kind] += count
        self.step_tokens.observe(num_tokens)
        self.num_preemptions += step.preempted
        self.swapped_out_blocks += step.swapped_out
        self.swapped_in_blocks += step.swapped_in
        self.step_s += step.duration_s
        self.device_busy_s += step.device_busy_s
        self.num_graph_steps += step.is_graph
        self.cpu_attention_s += sum(step.cpu_attention_s or ())
        self.cpu_waiting_s += step.cpu_waiting_s or 0.0
        if step.predicted is not None:
            self._compare(step)

    def _compare(self, step: StepRecord) -> None:
        """Add up what was predicted and measured of the same steps."""
        predicted = step.predicted
        assert predicted is not None
        self.predicted_s["step"] += predicted.step_s
        self.measured_s["step"] += step.duration_s
        if step.cpu_attention_s is not None:
            self.predicted_s["cpu_attention"] += sum(predicted.cpu_attention_s)
            self.measured_s["cpu_attention"] += sum(step.cpu_attention_s)
