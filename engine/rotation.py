"""Where rotating rows leave things between steps: the residual stream, and the CPU's answer.

The runner's book-keeping for overlap mode. It forgets a request as soon as a plan shows that it no
longer rotates; its token then starts again at the first layer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from engine.direct_rows import DirectChoice, DirectRow, deferred_segments
from engine.request import Request
from engine.step_plan import RotatingRow, ScheduledRequest, StepPlan

_MAX_SEGMENTS = 4
"""Hand-overs of a step. With four, each answer may take half a step longer than its share of it."""

_LEAST_ROOM = 8
"""Of a layer that there is room for, however few rows may rotate."""


@dataclass(slots=True)
class _Place:
    """Of a row's residual stream, of what it handed over last, and of its answer.

    `answer` and `sent` count among their segment's; `is_direct` if the device attends to it.
    """

    slot: int
    answer: int = 0
    sent: int = 0
    is_direct: bool = False


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
        is_direct: Of each row, whether the device attends to what it hands over in this step.
        direct: What the device attends to in this step, segment by segment; empty lists if it
            leaves all to the CPU.
    """

    rows: Sequence[RotatingRow | None]
    bounds: Sequence[int]
    segments: Sequence[range]
    slots: Sequence[int]
    answers: Sequence[int]
    residuals: torch.Tensor
    is_direct: Sequence[bool] = ()
    direct: Sequence[Sequence[DirectRow]] = ()

    @property
    def num_direct(self) -> int:
        """Most rows of a segment that the device attends to."""
        return max(map(len, self.direct), default=0)

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
        direct: Which rows the device may attend to itself; None: none.
    """

    def __init__(
        self,
        num_layers: int,
        max_rows: int,
        like: torch.Tensor,
        direct: DirectChoice | None = None,
    ) -> None:
        # The last place is for rows to spare.
        self.residuals = like.new_zeros(max_rows + 1, like.shape[-1])
        self.segments = rotation_segments(num_layers)
        self._num_layers = num_layers
        self._spare_slot = max_rows
        self._free = list(range(max_rows - 1, -1, -1))
        self._places: dict[Request, _Place] = {}
        self.direct = direct
        self._segment_of = [number for number, segment in enumerate(self.segments) for _ in segment]
        self._deferred = deferred_segments(len(self.segments))
        # Answers by the device have places of their own behind the CPU's; those of two steps in
        # turn, because a segment's last are still to be taken when its next are on their way.
        self._num_answers = segment_rows(num_layers, max_rows)
        self._is_odd = False

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
        direct = self._left_over(rows)
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
        slots, answers = [place.slot for place in places], [place.answer for place in places]
        for number, segment in enumerate(self.segments):
            first, last = bounds[segment.start], bounds[segment.stop]
            for index, place in enumerate(places[first:last]):
                if place is not spare:
                    place.answer = place.sent = index
            if self.direct is not None:
                chosen = self._choose(ordered[first:last], places[first:last])
                if number not in self._deferred:
                    direct[number] = chosen
        self._is_odd = not self._is_odd
        num_departing = bounds[self._num_layers]
        found = RotationPlaces(
            rows=ordered,
            bounds=bounds,
            segments=self.segments,
            slots=slots,
            answers=answers,
            residuals=self.residuals,
            is_direct=[place.is_direct for place in places[:num_departing]],
            direct=() if self.direct is None else direct,
        )
        for row in rows:
            if row.samples:
                self._forget(row.share.request)
        return found

    def _left_over(self, rows: Sequence[RotatingRow]) -> list[list[DirectRow]]:
        """Return what the last overlap step left to this one, segment by segment."""
        found: list[list[DirectRow]] = [[] for _ in self.segments]
        for row in rows if self.direct is not None else ():
            if row.layer is None or self._segment_of[row.layer] not in self._deferred:
                continue
            place = self._places[row.share.request]
            if place.is_direct:
                direct = DirectRow(place.sent, place.answer, place.slot, row.layer)
                found[self._segment_of[row.layer]].append(direct)
        return found

    def _choose(
        self, rows: Sequence[RotatingRow | None], places: Sequence[_Place]
    ) -> list[DirectRow]:
        """Decide which rows of a segment the device attends to, and return them."""
        assert self.direct is not None
        if not self.direct.share:
            for place in places:
                place.is_direct = False
            return []
        self.direct.begin_segment()
        first = self._num_answers * (2 if self._is_odd else 1)
        chosen: list[DirectRow] = []
        for row, place in zip(rows, places, strict=True):
            if row is None:
                continue
            place.is_direct = self.direct.takes(row.share.end)
            if place.is_direct:
                place.answer = first + len(chosen)
                chosen.append(DirectRow(place.sent, place.answer, place.slot, row.next_layer))
        return chosen

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
