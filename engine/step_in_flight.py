"""A step on its way through the device, and what it gave once it is done."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.backends import DeviceMark, HostStepTimes
from engine.prompt_scoring import PromptScores
from engine.sampler import PendingTokens, SampledTokens
from engine.step_plan import StepMeasurement, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInFlight:
    """A step whose work the device has been given.

    Args:
        plan: What it computes.
        tokens: What it samples.
        start_s: When launching began, on the clock of `time.perf_counter`.
        launch_s: How long launching took.
        begin: Before its first work on the device.
        end: After its last.
        uses_host: Whether the CPU attends to some of its rows while it runs.
        rotation: The backend's number of the rotation, if it has rotating rows.
        graph_rows: Rows of the graph that it was launched as, those to spare included; 0 if none.
        captured: Whether that graph was captured for it, while the device had nothing to do.
        prompt_scores: Log-probabilities of prompt tokens, of requests that want them.
    """

    plan: StepPlan
    tokens: PendingTokens
    start_s: float
    launch_s: float
    begin: DeviceMark
    end: DeviceMark
    uses_host: bool
    graph_rows: int
    captured: bool
    rotation: int | None = None
    prompt_scores: Sequence[PromptScores] = ()

    @property
    def lets_next_go_ahead(self) -> bool:
        """Whether another step may be planned and launched before this one is done.

        Not if the next token takes the value of this one on the host.
        """
        return not any(item.request.params.needs_host_tokens for item in self.plan.sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave.

    Args:
        sampled: New tokens, in batch order.
        step_s: Wall time that the step added: since it was launched, or since the one before it
            was done if that was later.
        launch_s: What launching took of the host's time; for a step that runs behind another, it is
            hidden behind that.
        device_s: From the step's first work on the device to its last, waits for the CPU included.
        graph_rows: As of `StepInFlight`.
        captured: Whether that graph was captured for it.
        host: What the CPU did; None if it had nothing to do. In overlap mode, what it did for the
            rotating rows of the overlap step before.
    """

    sampled: SampledTokens
    step_s: float
    launch_s: float
    device_s: float
    graph_rows: int
    captured: bool
    host: HostStepTimes | None

    @property
    def is_graph(self) -> bool:
        """Whether it was launched as a graph."""
        return self.graph_rows > 0

    @property
    def device_busy_s(self) -> float:
        """Time for which the device had work of this step that it could do."""
        return self.device_s - (0.0 if self.host is None else self.host.device_waiting_s)

    @property
    def measurement(self) -> StepMeasurement:
        """What the cost model learns from."""
        attention_s = None if self.host is None else sum(self.host.attention_s)
        return StepMeasurement(
            step_s=self.step_s, device_busy_s=self.device_busy_s, cpu_attention_s=attention_s
        )
