"""What a step can be made of, and what it could become: the data between view and choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.request import Placement, Request
from engine.scheduling.lookahead import DeviceOutlook
from engine.scheduling.steady_state import MeanLoad
from engine.step_plan import ScheduledRequest, StepMode, StepPrediction, SubBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """What a step can be made of; blocks of decodes are reserved already.

    Args:
        gdec: Device-resident requests that decode; all of them do.
        cdec: Host-resident ones that could, by their right to; some may be rotating.
        prefilling: Requests on either side whose prompt is not finished, in order of arrival.
        waiting: Requests without blocks, in order of arrival.
        num_running: Requests with blocks.
        device_free: Blocks new requests may take on the device.
        device_total: Blocks of the device pool.
        host_free: The same on the host, without the headroom of those there.
        host_room: Requests that may still go to the host by choice.
        block_size: Tokens of a block.
        can_admit: New requests may start.
        swap_tokens: Tokens that move before the step, whatever is chosen.
        arriving_tokens: Tokens that move to the device beside the step.
        uses_host: The host may take part.
        rotates: Its rows should rotate, or else be computed in one go; None: whatever is best now.
        least_gain: Rate with host-resident rows over that without from which they are computed.
        is_due: A host-resident request has waited as long as it may.
        mean_load: Says what requests are like.
        outlook: Makes a fresh look at what the device will hold; None: new requests start there as
            soon as their prompts fit.
    """

    gdec: Sequence[Request]
    cdec: Sequence[Request]
    prefilling: Sequence[Request]
    waiting: Sequence[Request]
    num_running: int
    device_free: int
    device_total: int
    host_free: int
    host_room: int
    block_size: int
    can_admit: bool
    swap_tokens: int
    arriving_tokens: int
    uses_host: bool
    rotates: bool | None
    least_gain: float
    is_due: bool
    mean_load: Callable[[], MeanLoad]
    outlook: Callable[[], DeviceOutlook] | None = None


@dataclass(slots=True, kw_only=True)
class Draft:
    """A step that could be: rows, requests it starts and where, and what it is worth.

    `rate` is the tokens a second to compare by where the step's own do not tell: of a rotation that
    only begins, or of a step for which rows give up the layers that they are through. `rotates`
    says that it is one of overlap mode.
    """

    sub_batches: list[SubBatch]
    admitted: list[tuple[Request, Placement]] = field(default_factory=list)
    prediction: StepPrediction
    within_limit: bool = True
    rate: float | None = None
    rotates: bool = False

    @property
    def mode(self) -> StepMode:
        """GPU-only without host-resident rows."""
        if self.rotates:
            return StepMode.OVERLAP
        has_host_rows = any(s.cdec or s.cprf for s in self.sub_batches)
        return StepMode.ASYMMETRIC if has_host_rows else StepMode.GPU_ONLY

    @property
    def fills_host(self) -> bool:
        """Whether prompts go to the host: an investment that later steps repay."""
        return any(s.cprf for s in self.sub_batches)

    @property
    def prompts(self) -> list[ScheduledRequest]:
        """Chunks of prompts, on either side."""
        return [item for s in self.sub_batches for item in s.gprf + s.cprf]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts, on either side."""
        return sum(item.num_tokens for item in self.prompts)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is computed."""
        return all(s.is_empty for s in self.sub_batches)

    @property
    def merit(self) -> tuple[bool, float]:
        """What drafts are compared by: the limit first, then the rate."""
        return self.within_limit, self.prediction.tokens_per_s if self.rate is None else self.rate


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen draft, why, and what it was compared with."""

    draft: Draft
    gpu_only: Draft | None
    reason: str
    forced: bool = False
