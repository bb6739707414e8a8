"""Makes the records of steps, in the engine process."""

import time

from engine.runner import ModelRunner
from engine.server.step_record import Prediction, RowCounts, StepRecord
from engine.step_in_flight import StepResult
from engine.step_plan import StepPlan, StepPrediction, SubBatch


class StepRecorder:
    """Collects the records of steps until they are taken; `observe` is a `StepObserver`."""

    def __init__(self) -> None:
        self._records: list[StepRecord] = []
        self._num_steps = 0

    def take(self) -> list[StepRecord]:
        """Return the records since the last call."""
        records, self._records = self._records, []
        return records

    def observe(
        self, plan: StepPlan, result: StepResult | None, runner: ModelRunner, error: str | None
    ) -> None:
        """Record a step that has just ended."""
        duration_s = 0.0 if result is None else result.step_s
        host = None if result is None else result.host
        self._num_steps += 1
        self._records.append(
            StepRecord(
                number=self._num_steps,
                start_s=time.monotonic() - duration_s,
                duration_s=duration_s,
                mode=plan.mode.value,
                reason=plan.reason,
                rows=[_row_counts(sub_batch) for sub_batch in plan.sub_batches],
                num_sampled=0 if result is None else len(result.sampled.token_ids),
                swapped_out=sum(len(swap.device_blocks) for swap in plan.swaps_out),
                swapped_in=sum(len(swap.device_blocks) for swap in plan.swaps_in),
                preempted=len(plan.preempted),
                predicted=None if plan.prediction is None else _prediction(plan.prediction),
                launch_s=0.0 if result is None else result.launch_s,
                device_s=0.0 if result is None else result.device_s,
                device_busy_s=0.0 if result is None else result.device_busy_s,
                is_graph=result is not None and result.is_graph,
                cpu_attention_s=None if host is None else host.attention_s,
                cpu_waiting_s=None if host is None else host.waiting_s,
                error=error,
            )
        )


def _row_counts(sub_batch: SubBatch) -> RowCounts:
    return RowCounts(
        gdec=len(sub_batch.gdec),
        gprf=sum(item.num_tokens for item in sub_batch.gprf),
        cprf=sum(item.num_tokens for item in sub_batch.cprf),
        cdec=len(sub_batch.cdec),
        rotating=len(sub_batch.rotating),
    )


def _prediction(prediction: StepPrediction) -> Prediction:
    return Prediction(
        step_s=prediction.step_s,
        linear_s=prediction.linear_s,
        gpu_attention_s=prediction.gpu_attention_s,
        cpu_attention_s=prediction.cpu_attention_s,
        prefill_attention_s=prediction.prefill_attention_s,
        exposed_cpu_s=prediction.exposed_cpu_s,
        swap_s=prediction.swap_s,
        fixed_s=prediction.fixed_s,
    )
