"""What an engine has done since it started, added up."""

from collections import Counter
from dataclasses import dataclass, field

from engine.step_in_flight import StepResult
from engine.step_plan import StepPlan


@dataclass(slots=True)
class EngineStats:
    """Totals over all steps; times in seconds.

    `prefill_tokens` and `decode_tokens` went through the model. `rows` counts rows by kind:
    tokens for `gprf` and `cprf`, requests for `gdec` and `cdec`, and for `rotating`, whose rows go
    through one layer a step. `predicted_step_time_s` adds up
    only steps that had a prediction, and `matched_step_time_s` is the measured time of the same.
    """

    load_time_s: float = 0.0
    num_steps: int = 0
    num_failed_steps: int = 0
    graph_steps: int = 0
    graph_captures: int = 0
    steps_by_mode: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    prefill_tokens: int = 0
    decode_tokens: int = 0
    generated_tokens: int = 0
    num_preemptions: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    step_time_s: float = 0.0
    device_busy_time_s: float = 0.0
    cpu_attention_time_s: float = 0.0
    predicted_step_time_s: float = 0.0
    matched_step_time_s: float = 0.0
    peak_used_blocks: int = 0
    peak_used_host_blocks: int = 0

    def record(
        self, plan: StepPlan, result: StepResult, used_blocks: int, used_host_blocks: int
    ) -> None:
        """Count a step that was computed, before its tokens are appended."""
        self.num_steps += 1
        self.steps_by_mode[plan.mode.value] += 1
        for sub_batch in plan.sub_batches:
            self.rows["gdec"] += len(sub_batch.gdec)
            self.rows["cdec"] += len(sub_batch.cdec)
            self.rows["rotating"] += len(sub_batch.rotating)
            self.rows["gprf"] += sum(item.num_tokens for item in sub_batch.gprf)
            self.rows["cprf"] += sum(item.num_tokens for item in sub_batch.cprf)
        self.decode_tokens += plan.num_decodes
        self.prefill_tokens += plan.num_tokens - plan.num_decodes
        self.generated_tokens += sum(not item.request.is_finished for item in plan.sampling)
        self.num_preemptions += len(plan.preempted)
        self.swapped_out_blocks += sum(len(swap.device_blocks) for swap in plan.swaps_out)
        self.swapped_in_blocks += sum(len(swap.device_blocks) for swap in plan.swaps_in)
        self.peak_used_blocks = max(self.peak_used_blocks, used_blocks)
        self.peak_used_host_blocks = max(self.peak_used_host_blocks, used_host_blocks)
        self.step_time_s += result.step_s
        self.device_busy_time_s += result.device_busy_s
        self.graph_steps += result.is_graph
        self.graph_captures += result.captured
        if result.host is not None:
            self.cpu_attention_time_s += sum(result.host.attention_s)
        if plan.prediction is not None:
            self.predicted_step_time_s += plan.prediction.step_s
            self.matched_step_time_s += result.step_s
