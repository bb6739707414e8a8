"""What the dashboard and the metrics know of one step; plain numbers, cheap to make and to send."""

from typing import Any, NamedTuple


class RowCounts(NamedTuple):
    """Rows of a sub-batch by kind: requests for the decodes, tokens for the prefills.

    `rotating` decodes go through one layer a step.
    """

    gdec: int
    gprf: int
    cprf: int
    cdec: int
    rotating: int


class Prediction(NamedTuple):
    """Predicted seconds; the attention and linear parts have one entry a sub-batch."""

    step_s: float
    linear_s: tuple[float, ...]
    gpu_attention_s: tuple[float, ...]
    cpu_attention_s: tuple[float, ...]
    prefill_attention_s: float
    exposed_cpu_s: float
    swap_s: float
    fixed_s: float


class StepRecord(NamedTuple):
    """One step.

    `start_s` is on the machine's monotonic clock. `launch_s` is what launching took of the engine's
    time, `device_s` lasts from the step's first work on the device to its last, and of that the
    device could work for `device_busy_s`. `cpu_attention_s` (one entry a sub-batch) and
    `cpu_waiting_s` are what the CPU's attention did and how long it was ready without rows; None
    where it had no part.
    """

    number: int
    start_s: float
    duration_s: float
    mode: str
    reason: str
    rows: list[RowCounts]
    num_sampled: int
    swapped_out: int
    swapped_in: int
    preempted: int
    predicted: Prediction | None
    launch_s: float
    device_s: float
    device_busy_s: float
    is_graph: bool
    cpu_attention_s: tuple[float, ...] | None
    cpu_waiting_s: float | None
    error: str | None

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return self._asdict() | {
            "rows": [rows._asdict() for rows in self.rows],
            "predicted": None if self.predicted is None else self.predicted._asdict(),
        }
