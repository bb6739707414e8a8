"""Where rotating rows leave things between steps: the residual stream, and the CPU's answer.

The runner's book-keeping for overlap mode. It forgets a request as soon as a plan shows that it no
longer rotates; its token then starts again at the first layer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from engine.request import Request
from engine.step_plan import RotatingRow, ScheduledRequest, StepPlan

_MAX_SEGMENTS = 4
"""Hand-overs of a step. With four, each answer may take half a step longer than its share of it."""

_LEAST_ROOM = 8
"""Of a layer that there is room for, however few rows may rotate."""


@dataclass(slots=True)
class _Place:
    """Of a row's residual stream, and of its answer among its segment's."""

    slot: int
    answer: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationPlaces:
    """A step's rotating rows in the order of the layers they rejoin at, and their places.

    Args:
        rows: In that order; None for a row to spare.
        bounds: See `RotatingRows`.
        segments: See `RotatingRows`.
        slots: Of the residual streams.
        answers: See `RotatingRows`.
        residuals: See `RotatingRows`.
    """

    rows: Sequence[RotatingRow | None]
    bounds: Sequence[int]
    segments: Sequence[range]
    slots: Sequence[int]
    answers: Sequence[int]
    residuals: torch.Tensor

    @property
    def entering(self) -> list[ScheduledRequest]:
        """The shares that enter."""
        return [row.share for row in self.rows[: self.bounds[1]] if row is not None]

    @property
    def num_sampling(self) -> int:
        """Rows that get a token; they are the first of those behind the last layer."""
        return sum(row is not None for row in self.rows[self.bounds[-2] :])


class Rotation:
    """The rows that rotate.

    Args:
        num_layers: Of the model.
        max_rows: Most rows that rotate at once.
        like: Any tensor `[..., H]` with the residual stream's width, dtype and device.
    """

    def __init__(self, num_layers: int, max_rows: int, like: torch.Tensor) -> None:
        # The last place is for rows to spare.
        self.residuals = like.new_zeros(max_rows + 1, like.shape[-1])
        self.segments = rotation_segments(num_layers)
        self._num_layers = num_layers
        self._spare_slot = max_rows
        self._free = list(range(max_rows - 1, -1, -1))
        self._places: dict[Request, _Place] = {}

    def forget_leavers(self, plan: StepPlan) -> bool:
        """Forget who rotated and does not go on, now or in a later step.

        Returns:
            Whether there was anybody: the CPU may still be attending to them.
        """
        going_on = {row.share.request for row in plan.rotating if row.layer is not None}
        if not plan.rotating:
            going_on = {r for r in self._places if r.rotation_layer is not None}
        leavers = [request for request in self._places if request not in going_on]
        for request in leavers:
            self._forget(request)
        return bool(leavers)

    def clear(self) -> None:
        """Forget all rows."""
        for request in list(self._places):
            self._forget(request)

    def most_at_once(self, rows: Sequence[RotatingRow]) -> int:
        """Return most rows that are in the batch together."""
        return max(Counter(row.next_layer for row in rows).values(), default=0)

    def advance(self, rows: Sequence[RotatingRow], room: int | None = None) -> RotationPlaces:
        """Return where a step finds the rows' things, and remember where it will leave them.

        Args:
            rows: Those that have a layer were part of the last overlap step, at the layer before.
            room: Rows that every layer gets, with some to spare; None: as many as there are.
        """
        by_layer: list[list[RotatingRow | None]] = [[] for _ in range(self._num_layers + 1)]
        for row in rows:
            if row.layer is None:
                self._places[row.share.request] = _Place(self._free.pop())
            assert row.share.request in self._places, "a row goes on that has not begun"
            by_layer[row.next_layer].append(row)
        if room is not None:
            by_layer = [(some + [None] * room)[:room] for some in by_layer]
        ordered = [row for some in by_layer for row in some]
        bounds = [0, *accumulate(map(len, by_layer))]
        spare = _Place(self._spare_slot)
        places = [spare if row is None else self._places[row.share.request] for row in ordered]
        found = RotationPlaces(
            rows=ordered,
            bounds=bounds,
            segments=self.segments,
            slots=[place.slot for place in places],
            answers=[place.answer for place in places],
            residuals=self.residuals,
        )
        for segment in self.segments:
            first = bounds[segment.start]
            for index in range(first, bounds[segment.stop]):
                if places[index] is not spare:
                    places[index].answer = index - first
        for row in rows:
            if row.samples:
                self._forget(row.share.request)
        return found

    def _forget(self, request: Request) -> None:
        self._free.append(self._places.pop(request).slot)


def segment_rows(num_layers: int, max_rows: int) -> int:
    """Return the room of a segment: rows that it hands over, with those to spare.

    Args:
        num_layers: Of the model.
        max_rows: Most rows that rotate at once.
    """
    return max(max_rows, _LEAST_ROOM * _longest_segment(num_layers))


def most_visitors(num_layers: int, max_rows: int) -> int:
    """Return the rows for which every layer of a segment may have room."""
    return segment_rows(num_layers, max_rows) // _longest_segment(num_layers)


def _longest_segment(num_layers: int) -> int:
    return max(map(len, rotation_segments(num_layers)))


def rotation_segments(num_layers: int) -> list[range]:
    """Cut layers into segments of nearly equal length."""
    count = min(_MAX_SEGMENTS, num_layers)
    ends = [num_layers * (i + 1) // count for i in range(count)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
