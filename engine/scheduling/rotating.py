"""Which host-resident decodes are in a rotation, and how many it can hold.

A rotation takes as many steps to fill as a token takes to go round, so a step that only begins one
says little about it: what counts is the rotation once it is full. Rows enter a few at a time, so
that they are spread over the layers; then the host is busy all the time, and no layer is crowded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.cost_model import (
    CostModel,
    SubBatchLoad,
    predict,
    rotating_attention_s,
    rotation_steps,
)
from engine.request import Request
from engine.scheduling.dealing import largest, prefix_sums
from engine.scheduling.step_view import StepView
from engine.step_plan import RotatingRow, ScheduledRequest, SubBatch


@dataclass(frozen=True, slots=True)
class RotationDraft:
    """A step's rotating rows, and how many requests, of how many tokens, a full rotation has."""

    rows: list[RotatingRow]
    num_full: int
    full_tokens: int


def form_rotation(
    model: CostModel, view: StepView, base: SubBatch, shares: dict[Request, ScheduledRequest]
) -> RotationDraft:
    """Choose a step's rotating rows: all that rotate go on, and some that do not may enter.

    Args:
        model: Times of the parts.
        view: What there is.
        base: The step's other rows.
        shares: Those of rows that were formed last, which stay the same while a token goes round;
            replaced by these rows'.
    """
    going_on = [request for request in view.cdec if request.rotation_layer is not None]
    ready = [request for request in view.cdec if request.rotation_layer is None]
    prefix = prefix_sums([request.num_tokens for request in going_on + ready])
    num_full = _num_hidden(model, base, prefix)
    room = max(0, num_full - len(going_on))
    most_at_once = -(-num_full // rotation_steps(model))
    num_entering = min(room, most_at_once, len(ready))
    if ready and not num_entering and (view.is_due or not going_on):
        num_entering = 1
    last_layer = model.num_layers - 1
    rows = [_row(r, last_layer, shares.get(r)) for r in going_on + ready[:num_entering]]
    shares.clear()
    shares.update((row.share.request, row.share) for row in rows)
    num_full = max(num_full, len(rows))
    return RotationDraft(rows, num_full, prefix[num_full])


def lost_tokens(model: CostModel, cdec: Sequence[Request]) -> list[float]:
    """Return what the first 0, 1, 2, ... rows are through of their tokens, if they rotate."""
    steps = rotation_steps(model)
    done = (0 if r.rotation_layer is None else r.rotation_layer + 1 for r in cdec)
    return list(accumulate((layers / steps for layers in done), initial=0.0))


def _num_hidden(model: CostModel, base: SubBatch, prefix: Sequence[int]) -> int:
    """Return how many rows the host attends to in a step that only decodes."""
    load = SubBatchLoad(
        num_gdec=len(base.gdec), gdec_tokens=sum(item.end for item in base.gdec), num_rotating=1
    )
    device_s = predict(model, [load]).step_s

    def is_hidden(num_rows: int) -> bool:
        times = rotating_attention_s(model, num_rows, prefix[num_rows], model.most_direct_share)
        return max(times) <= device_s

    return largest(len(prefix) - 1, is_hidden)


def _row(request: Request, last_layer: int, share: ScheduledRequest | None) -> RotatingRow:
    if share is None or share.start != request.num_computed_tokens:
        share = ScheduledRequest(request, request.num_computed_tokens, 1)
    return RotatingRow(share, request.rotation_layer, request.rotation_layer == last_layer)
