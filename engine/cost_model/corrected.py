"""Corrects another cost model by what steps really took.

Offline tables go stale: the machine is shared, clocks fall, lengths differ from those measured.
Each part has a factor that follows measured over predicted time, slowly and within bounds, so that
one outlier cannot turn the scheduler's choice round. Factors multiply, so they move by logarithms.
Linear layers of few and of many rows have a factor each, and those of many a further one for steps
with rotating rows, whose prompts go to the host: the device alone must not be charged for that. The
host has factors for each way of using it, because what slows down answers that are waited for in
every layer need not slow down those that are not. They fade while no step uses the host so: a slow
spell must not rule it out for good.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

from engine.cost_model.base import CostModel
from engine.errors import ConfigError
from engine.step_plan import StepMeasurement, StepPrediction

_DEVICE_PARTS = ("linear", "gpu_attention", "prefill_attention", "fixed")
_HOST_PARTS = ("cpu_attention", "handover")
_ROTATING_PARTS = ("rotating_attention", "rotating_handover", "rotating_linear")
_PARTS = (*_DEVICE_PARTS, "long_linear", *_HOST_PARTS, *_ROTATING_PARTS, "swap")
_FEW_ROWS = 64
"""Up to so many, linear layers take what reading the weights takes. Beyond, they depend on clocks,
which fall where a GPU runs into its power limit: that says nothing about steps that only decode."""


class CorrectedCostModel:
    """A `CostModel` that learns a factor for each part of another one.

    Args:
        inner: The model to correct.
        weight: Weight of the newest step, in (0, 1].
        max_step_ratio: Most that one step counts for, as measured over predicted or its inverse.
        max_factor: Most that a factor becomes, or its inverse.
        fading: What a step takes off the corrections of the ways of using the host that it leaves
            out, in [0, 1).

    Raises:
        ConfigError: A bound is out of range.
    """

    def __init__(
        self,
        inner: CostModel,
        *,
        weight: float = 0.05,
        max_step_ratio: float = 2.0,
        max_factor: float = 5.0,
        fading: float = 0.002,
    ) -> None:
        if not 0 <= fading < 1:
            raise ConfigError(f"fading must be at least 0 and below 1, got {fading}")
        if not 0 < weight <= 1:
            raise ConfigError(f"weight must be above 0 and at most 1, got {weight}")
        for name, value in (("max_step_ratio", max_step_ratio), ("max_factor", max_factor)):
            if not 1 <= value < math.inf:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.inner = inner
        self._weight = weight
        self._fading = fading
        self._max_step_log = math.log(max_step_ratio)
        self._max_log = math.log(max_factor)
        self._logs = dict.fromkeys(_PARTS, 0.0)
        self._factors = dict.fromkeys(_PARTS, 1.0)

    @property
    def factors(self) -> Mapping[str, float]:
        """Measured over predicted time of each part, as learnt so far."""
        return MappingProxyType(self._factors)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.inner.num_layers

    @property
    def most_direct_share(self) -> float:
        """As of the other model."""
        return self.inner.most_direct_share

    def linear_s(self, num_rows: int, *, rotating: bool = False) -> float:
        """Return the corrected time."""
        factor = self._factors["linear" if num_rows <= _FEW_ROWS else "long_linear"]
        if rotating and num_rows > _FEW_ROWS:
            factor *= self._factors["rotating_linear"]
        return factor * self.inner.linear_s(num_rows, rotating=rotating)

    def prefill_attention_s(self, query_len: int, context_len: int) -> float:
        """Return the corrected time."""
        factor = self._factors["prefill_attention"]
        return factor * self.inner.prefill_attention_s(query_len, context_len)

    def gpu_attention_s(self, num_seqs: int, total_tokens: int) -> float:
        """Return the corrected time."""
        return self._factors["gpu_attention"] * self.inner.gpu_attention_s(num_seqs, total_tokens)

    def cpu_attention_s(self, num_rows: int, total_tokens: int, *, rotating: bool = False) -> float:
        """Return the corrected time."""
        factor = self._factors["rotating_attention" if rotating else "cpu_attention"]
        return factor * self.inner.cpu_attention_s(num_rows, total_tokens, rotating=rotating)

    def handover_s(self, *, rotating: bool = False) -> float:
        """Return the corrected time."""
        factor = self._factors["rotating_handover" if rotating else "handover"]
        return factor * self.inner.handover_s(rotating=rotating)

    def launch_s(self, num_handovers: int) -> float:
        """Return the time as it is: what it hides behind other parts is not known."""
        return self.inner.launch_s(num_handovers)

    def swap_s(self, num_tokens: int) -> float:
        """Return the corrected time."""
        return self._factors["swap"] * self.inner.swap_s(num_tokens)

    def fixed_step_s(self, num_sampled: int) -> float:
        """Return the corrected time."""
        return self._factors["fixed"] * self.inner.fixed_step_s(num_sampled)

    def observe(self, prediction: StepPrediction, measured: StepMeasurement) -> None:
        """Learn from a step.

        Parts that were measured correct their own factor. The device's parts learn from steps in
        which no host-resident row decoded, and from those with rotating rows if the device's own
        time is known; the hand-over of these learns what the device took beyond its prediction, if
        there were no prompts. Other steps with host-resident rows, if longer than predicted or
        waiting for the host, teach the host's parts what the device's prediction leaves over.

        Args:
            prediction: This model's own, as the plan carried it.
            measured: What the step took.
        """
        predicted = _parts(prediction)
        attention, handover = _host_parts(prediction)
        linear = _linear_part(prediction)
        known = {name: getattr(measured, f"{name}_s") for name in (*_DEVICE_PARTS, "swap")}
        known[linear] = known.pop("linear")
        known |= {attention: measured.cpu_attention_s, handover: measured.handover_s}
        if all(value is None for value in known.values()):
            known = _attribute(prediction, measured.step_s)
        elif prediction.rotates and measured.device_busy_s is not None:
            known |= _rotation_parts(prediction, measured.device_busy_s)
        elif _tells_handover(prediction, measured):
            # The device's parts learn from steps without host rows; what a step with them takes
            # beyond its prediction is what they cost the device.
            known[handover] = prediction.handover_s + measured.step_s - prediction.step_s
        for name, value in known.items():
            if value is not None and value > 0 and predicted[name] > 0:
                self._learn(name, value / predicted[name])
        for parts in (_HOST_PARTS, _ROTATING_PARTS):
            if predicted.get(parts[0], 0.0) == 0:
                for name in parts:
                    self._set_log(name, self._logs[name] * (1 - self._fading))

    def _learn(self, name: str, ratio: float) -> None:
        """Move a factor towards `ratio` times itself."""
        error = max(-self._max_step_log, min(self._max_step_log, math.log(ratio)))
        self._set_log(name, self._logs[name] + self._weight * error)

    def _set_log(self, name: str, log: float) -> None:
        self._logs[name] = max(-self._max_log, min(self._max_log, log))
        self._factors[name] = math.exp(self._logs[name])


def _host_parts(prediction: StepPrediction) -> tuple[str, str]:
    """Return the names of the host's attention and hand-over in a step's mode."""
    attention, handover, *_ = _ROTATING_PARTS if prediction.rotates else _HOST_PARTS
    return attention, handover


def _tells_handover(prediction: StepPrediction, measured: StepMeasurement) -> bool:
    if prediction.rotates or prediction.moves_kv:
        return False
    return measured.handover_s is None and prediction.handover_s > 0


def _linear_part(prediction: StepPrediction) -> str:
    """Return the name of a step's linear layers."""
    if prediction.most_rows <= _FEW_ROWS:
        return "linear"
    return "rotating_linear" if prediction.rotates else "long_linear"


def _rotation_parts(prediction: StepPrediction, busy_s: float) -> dict[str, float | None]:
    """Return what the device's parts took in a step with rotating rows."""
    if prediction.moves_kv:
        return {}
    predicted_s = prediction.step_s - prediction.exposed_cpu_s
    found = _device_parts(prediction, busy_s, predicted_s)
    if prediction.prefill_attention_s == 0:
        handover_s = prediction.handover_s + busy_s - predicted_s
        found["rotating_handover"] = max(handover_s, 1e-3 * prediction.handover_s)
    return found


def _device_parts(
    prediction: StepPrediction, taken_s: float, predicted_s: float
) -> dict[str, float | None]:
    """Share out the device's time of a step among its parts; prompts vary more than all else."""
    parts, linear = _parts(prediction), _linear_part(prediction)
    if linear == "linear":
        return {name: parts[name] * taken_s / predicted_s for name in _DEVICE_PARTS}
    names = [linear] if prediction.rotates else [linear, "prefill_attention"]
    long_s = sum(parts[name] for name in names)
    ratio = max(0.0, long_s + taken_s - predicted_s) / long_s
    return {name: parts[name] * ratio for name in names}


def _parts(prediction: StepPrediction) -> dict[str, float]:
    attention, handover = _host_parts(prediction)
    return {
        _linear_part(prediction): sum(prediction.linear_s),
        "gpu_attention": sum(prediction.gpu_attention_s),
        "prefill_attention": prediction.prefill_attention_s,
        "fixed": prediction.fixed_s,
        attention: sum(prediction.cpu_attention_s),
        handover: prediction.handover_s,
        "swap": prediction.swap_s,
    }


def _attribute(prediction: StepPrediction, step_s: float) -> dict[str, float | None]:
    """Share out a step's time, known as a whole only, among the parts that explain it."""
    parts, names = _parts(prediction), _host_parts(prediction)
    if prediction.moves_kv:
        return {}  # how much of it the move took is anybody's guess
    if parts[names[0]] == 0:
        return _device_parts(prediction, step_s, prediction.step_s)
    excess_s = step_s - prediction.step_s
    if excess_s <= 0 and prediction.exposed_cpu_s == 0:
        return {}
    host_s = sum(parts[name] for name in names)
    ratio = max(0.0, host_s + excess_s) / host_s
    return {name: parts[name] * ratio for name in names}
