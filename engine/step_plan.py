"""What one step computes and moves: the scheduler's answer, the runner's order.

Plain data. Four kinds of row (the NEO paper, arXiv 2411.01142): `gprf` and `gdec` keep their KV on
the device, `cprf` and `cdec` on the host; prf is prefill, dec is decode. A `cdec` row goes through
all layers in one step; in overlap mode, host-resident decodes rotate: one layer a step.
"""

import enum
from dataclasses import dataclass, field

from engine.request import Request


class StepMode(enum.Enum):
    """How a step runs."""

    GPU_ONLY = "gpu_only"
    """One batch, no host-resident rows."""
    ASYMMETRIC = "asymmetric"
    """Up to two sub-batches; each one's CPU attention runs behind the other's GPU work."""
    OVERLAP = "overlap"
    """One batch, and rotating rows: the CPU attends to them behind the whole step."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's share of a step: tokens `start` to `start + num_tokens` go through the model.

    `samples` says whether the step ends with a new token for this request (not so for inner
    chunks); it is settled when the share is made, because the request grows while the step runs.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.end == self.request.num_tokens)

    @property
    def end(self) -> int:
        """Tokens in the KV cache after the step."""
        return self.start + self.num_tokens

    @property
    def num_scored(self) -> int:
        """Rows, from the first on, whose next token is one of a prompt that is to be scored.

        After a preemption these are computed and scored once more, to the same result.
        """
        if self.request.params.prompt_logprobs is None:
            return 0
        return max(0, min(self.end, len(self.request.prompt_token_ids) - 1) - self.start)


@dataclass(frozen=True, slots=True)
class RotatingRow:
    """A host-resident decode's share of an overlap step: one layer of the model.

    It rejoins the batch behind the attention of `layer`, which the CPU has computed since the last
    overlap step, and leaves it again with Q, K and V of the next layer, or, if it `samples`, behind
    the last layer with a new token. A row whose `layer` is None enters with its newest token, so
    that a token takes one step more than the model has layers.

    Source: the idea is that of APEX (arXiv 2506.03296) and OmniServe (arXiv 2603.12831).
    """

    share: ScheduledRequest
    layer: int | None
    samples: bool

    @property
    def next_layer(self) -> int:
        """Whose Q, K and V the step computes for it; the number of layers if it samples."""
        return 0 if self.layer is None else self.layer + 1


@dataclass(slots=True)
class SubBatch:
    """The rows that go through a layer together; rotating ones only through one of them."""

    gdec: list[ScheduledRequest] = field(default_factory=list)
    gprf: list[ScheduledRequest] = field(default_factory=list)
    cprf: list[ScheduledRequest] = field(default_factory=list)
    cdec: list[ScheduledRequest] = field(default_factory=list)
    rotating: list[RotatingRow] = field(default_factory=list)

    @property
    def resident(self) -> list[ScheduledRequest]:
        """The shares that go through every layer, in batch order: gdec, gprf, cprf, cdec."""
        return self.gdec + self.gprf + self.cprf + self.cdec

    @property
    def scheduled(self) -> list[ScheduledRequest]:
        """The shares that the step completes: those of every layer, then rows that sample."""
        return self.resident + [row.share for row in self.rotating if row.samples]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.gdec or self.gprf or self.cprf or self.cdec or self.rotating)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, or through the rest of it."""
        return sum(item.num_tokens for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class Swap:
    """Blocks of one request that move before the step computes, or beside it: `moves_beside`.

    `device_blocks[i]` and `host_blocks[i]` hold the same tokens. The accounting has changed already
    when the plan is made; a step moves blocks in one direction only.
    """

    request: Request
    device_blocks: tuple[int, ...]
    host_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """Predicted times of a step in seconds; a layer's parts are summed over all layers.

    `step_s` is the whole step; `linear_s`, `gpu_attention_s` and `cpu_attention_s` have one entry a
    sub-batch; `exposed_cpu_s` is the CPU attention that no GPU work hides. `prompt_copy_s` is the
    copying of `cprf` rows' K and V, `launch_s` the host's launching and `arriving_s` the moving of
    requests that come to the device, which all run beside the layers; `swap_s` is what moves before
    them; `fixed_s` is what a step costs beside its layers; `rotates` says that the CPU attends to
    rotating rows, `most_rows` how many a layer computes at once, `direct_share` how much of the
    rotating rows' tokens the device attends to itself. `tokens_per_s` is what the scheduler
    compares: decode tokens, with prefill tokens counted at what they cost (see
    `engine.scheduling.step_former`).
    """

    step_s: float
    linear_s: tuple[float, ...]
    gpu_attention_s: tuple[float, ...]
    cpu_attention_s: tuple[float, ...]
    prefill_attention_s: float
    swap_s: float
    handover_s: float
    exposed_cpu_s: float
    tokens_per_s: float
    prompt_copy_s: float = 0.0
    launch_s: float = 0.0
    fixed_s: float = 0.0
    arriving_s: float = 0.0
    rotates: bool = False
    most_rows: int = 0
    direct_share: float = 0.0

    @property
    def moves_kv(self) -> bool:
        """Whether requests move, which takes an unknown part of a measured step."""
        return self.swap_s > 0 or self.arriving_s > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMeasurement:
    """Measured times of a step in seconds, all sub-batches and layers together; None: unknown.

    `fixed_s` is what a step costs beside its layers and swaps, `device_busy_s` what the device took
    without its waits for the host's attention.
    """

    step_s: float
    device_busy_s: float | None = None
    linear_s: float | None = None
    gpu_attention_s: float | None = None
    prefill_attention_s: float | None = None
    cpu_attention_s: float | None = None
    handover_s: float | None = None
    swap_s: float | None = None
    fixed_s: float | None = None


@dataclass(slots=True)
class StepPlan:
    """What one step computes and moves."""

    mode: StepMode = StepMode.GPU_ONLY
    sub_batches: list[SubBatch] = field(default_factory=lambda: [SubBatch()])
    swaps_out: list[Swap] = field(default_factory=list)
    swaps_in: list[Swap] = field(default_factory=list)
    moves_beside: bool = False
    """Whether those that are swapped in take no part, so that they move while the step computes."""
    preempted: list[Request] = field(default_factory=list)
    """Who lost its blocks. If that left nobody running, it may start again in this very step."""
    direct_share: float = 0.0
    """Of the tokens that rotating rows attend to, what the device does itself."""
    prediction: StepPrediction | None = None
    gpu_only_prediction: StepPrediction | None = None
    """What the best step without host-resident rows would have been; None where there is none."""
    reason: str = ""
    """Why this mode, in a few words, for logs."""
    forced: bool = False
    """Whether a host-resident request that had waited long enough made the choice, not the rate."""
    is_begun: bool = False
    """Whether the scheduler counts it as on its way."""

    @property
    def scheduled(self) -> list[ScheduledRequest]:
        """All shares, sub-batch by sub-batch, in batch order."""
        return [item for sub_batch in self.sub_batches for item in sub_batch.scheduled]

    @property
    def sampling(self) -> list[ScheduledRequest]:
        """The shares that end with a new token, in batch order."""
        return [item for item in self.scheduled if item.samples]

    @property
    def rotating(self) -> list[RotatingRow]:
        """All rotating rows."""
        return [row for sub_batch in self.sub_batches for row in sub_batch.rotating]

    @property
    def requests(self) -> list[Request]:
        """Every request that the step computes or moves, once."""
        involved = [item.request for item in self.scheduled]
        involved += [row.share.request for row in self.rotating]
        involved += [swap.request for swap in self.swaps_out + self.swaps_in]
        return list(dict.fromkeys(involved))

    @property
    def num_tokens(self) -> int:
        """Tokens that the step completes."""
        return sum(sub_batch.num_tokens for sub_batch in self.sub_batches)

    @property
    def num_decodes(self) -> int:
        """Decodes that the step completes, on either side."""
        rotated = sum(row.samples for row in self.rotating)
        return rotated + sum(len(s.gdec) + len(s.cdec) for s in self.sub_batches)

    @property
    def has_prefills(self) -> bool:
        """Whether any prompt tokens are computed."""
        return any(s.gprf or s.cprf for s in self.sub_batches)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute; there may be something to move."""
        return all(sub_batch.is_empty for sub_batch in self.sub_batches)
