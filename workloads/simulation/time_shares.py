"""Where the time of simulated steps goes, and so what limits a machine."""

from dataclasses import dataclass

from engine.cost_model import CostModel
from engine.step_plan import StepPlan

_BUSY = 0.85
"""Above this share of the time, the host's memory is the limit whatever the device does."""


@dataclass(slots=True)
class TimeShares:
    """Seconds of the device's time by cause, over all steps.

    `weights_s` is what the linear layers take for a single row: reading the weights. What more rows
    add to that is `arithmetic_s`. `cpu_attention_s` runs beside the rest; what of it shows is
    `exposed_cpu_s`.
    """

    total_s: float = 0.0
    weights_s: float = 0.0
    arithmetic_s: float = 0.0
    prefill_attention_s: float = 0.0
    gpu_attention_s: float = 0.0
    cpu_attention_s: float = 0.0
    exposed_cpu_s: float = 0.0
    swap_s: float = 0.0
    handover_s: float = 0.0
    fixed_s: float = 0.0
    num_decodes: int = 0

    def add(self, plan: StepPlan, model: CostModel) -> None:
        """Add a step."""
        prediction = plan.prediction
        assert prediction is not None
        linear_s = sum(prediction.linear_s)
        num_passes = sum(part > 0 for part in prediction.linear_s)
        weights_s = min(linear_s, num_passes * model.num_layers * model.linear_s(1))
        self.total_s += prediction.step_s
        self.weights_s += weights_s
        self.arithmetic_s += linear_s - weights_s
        self.prefill_attention_s += prediction.prefill_attention_s
        self.gpu_attention_s += sum(prediction.gpu_attention_s)
        self.cpu_attention_s += sum(prediction.cpu_attention_s)
        self.exposed_cpu_s += prediction.exposed_cpu_s
        self.swap_s += prediction.swap_s
        self.handover_s += prediction.handover_s
        self.fixed_s += prediction.fixed_s
        self.num_decodes += plan.num_decodes

    @property
    def cpu_busy(self) -> float:
        """Share of the time in which the CPU attends."""
        return self.cpu_attention_s / self.total_s if self.total_s else 0.0

    @property
    def limit(self) -> str:
        """What takes most of the time, in words."""
        if self.cpu_busy > _BUSY:
            return "host memory bandwidth"
        parts = {
            "reading weights": self.weights_s,
            "GPU arithmetic": self.arithmetic_s + self.prefill_attention_s,
            "reading KV on the GPU": self.gpu_attention_s,
            "waiting for the host": self.exposed_cpu_s,
            "moving KV": self.swap_s,
            "hand-overs": self.handover_s,
            "launching and sampling": self.fixed_s,
        }
        return max(parts, key=lambda name: parts[name])
