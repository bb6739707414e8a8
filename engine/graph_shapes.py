"""Which graph a step takes: one made for its shape, or a larger one that is there already.

A shape is numbers of tokens, of decodes and prefill chunks, a width of block tables, a number of
attention splits. Exact shapes come from ladders, so that steps share graphs. Steps with prompts or
with rows on the host still come in many, each of them rarely, and capturing takes as long as
computing thousands of rows. So the first such graph is a roomy one, steps that it holds take it,
with rows to spare, and a closer one is captured once those would have paid for it: first one that
is roomy for the step, which many others share, then one of its own.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from engine.backends import Backend
from engine.batch_builder import BatchBuilder
from engine.graph_limits import (
    MAX_GRAPH_TOKENS,
    MAX_STAGED_TOKENS,
    PROMPT_VISITORS,
    USUAL_DECODES,
    padded_tiles,
    whole_tiles,
)
from engine.kv_blocks import BlockPool
from engine.lane_fields import LaneFiller, LaneShape, PagedShape
from engine.step_plan import SubBatch

CAPTURE_ROWS = 2048
"""Spare rows that take as long as a capture: 12 to 19 µs each, 25 to 60 ms (Llama-3-8B and
Llama-2-7B on an H200)."""

_FEW_ROWS = 32
"""Up to so many, linear layers have kernels of their own on some GPUs."""
_BEYOND_FEW_ROWS = 64
"""What a step of more than these takes longer, in rows that it might have instead."""
_USUAL_TOKENS = (256, 512, MAX_GRAPH_TOKENS)
_USUAL_PREFIX = 64
"""Blocks of prompts that come back from the host for their next chunk."""
_USUAL_VISITORS = (4, PROMPT_VISITORS)


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a graph is captured for.

    Args:
        lanes: Its sub-batches.
        num_visitors: Rotating rows that every layer has room for.
    """

    lanes: tuple[LaneShape, ...]
    num_visitors: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that the first layer computes, and those between with other visitors."""
        return sum(lane.num_rows for lane in self.lanes)

    @property
    def recurs(self) -> bool:
        """Whether many steps have this very shape: those that only decode on the device."""
        return len(self.lanes) == 1 and self.lanes[0].only_decodes

    def holds(self, other: "GraphShape") -> bool:
        """Return whether steps of another shape can take a graph of this one.

        Nothing but room may differ: a graph that hands rows over waits for answers.
        """
        return (
            len(self.lanes) == len(other.lanes)
            and all(map(_holds, self.lanes, other.lanes))
            and _has_room(self.num_visitors, other.num_visitors)
        )


def _holds(lane: LaneShape, other: LaneShape) -> bool:
    return (
        _holds_rows(lane.device, other.device)
        and _holds_rows(lane.host_prefills, other.host_prefills)
        and _has_room(lane.num_host_decodes, other.num_host_decodes)
        and _has_room(lane.num_entering, other.num_entering)
        and lane.num_prefix >= other.num_prefix
        and lane.num_written >= other.num_written
    )


def _holds_rows(rows: PagedShape, other: PagedShape) -> bool:
    return (
        _has_room(rows.num_tokens, other.num_tokens)
        and _has_room(rows.num_prefills, other.num_prefills)
        and rows.num_decodes >= other.num_decodes
        and rows.width >= other.width
        and rows.num_splits >= other.num_splits
    )


def _has_room(number: int, other: int) -> bool:
    return number >= other and bool(number) == bool(other)


class GraphShapes:
    """Chooses shapes for steps.

    Args:
        backend: Says how attention is split.
        builder: Says whether prompts go to the host by way of staging blocks.
        pool: Accounting of the device's blocks.
        max_num_seqs: Most requests of a step.
        max_num_tokens: Most tokens of a step.
        max_model_len: Most tokens of a request.
        most_visitors: Most rotating rows that every layer may have room for.
    """

    def __init__(
        self,
        backend: Backend,
        builder: BatchBuilder,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        most_visitors: int,
    ) -> None:
        self._backend = backend
        self._pool = pool
        self._filler = LaneFiller(builder)
        self._uses_staging = builder.uses_staging
        self._decodes = row_ladder(max_num_seqs)
        self._few_rows = _steps([8, 16, 24, 32, 48, 64, 96, 128, 192], max_num_seqs)
        few = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
        self._visitors = _steps(few, most_visitors)
        self._mixed_decodes = _steps([32, 64, 128], max_num_seqs)
        self._prefills = _steps([4, 16, 64], max_num_seqs)
        self._tokens = token_ladder(min(max_num_tokens, MAX_GRAPH_TOKENS), max_num_seqs)
        self._max_width = pool.blocks_for(max_model_len)
        self.num_staging_blocks = pool.blocks_for(MAX_STAGED_TOKENS)
        self._prefixes = _steps([_USUAL_PREFIX], self.num_staging_blocks)
        self._staging_width = min(self.num_staging_blocks, self._max_width)
        self._spared: Counter[GraphShape] = Counter()

    @property
    def largest(self) -> GraphShape:
        """What has room for every step: two lanes of all kinds of rows."""
        lane = self._largest_lane(self._tokens[-1])
        return GraphShape((lane, lane), self._visitors[-1])

    @property
    def hungriest(self) -> tuple[GraphShape, GraphShape]:
        """Those on the device that take the most memory: decodes only, and with prompts."""
        most = self._decodes[-1]
        decodes = LaneShape(device=PagedShape(most, most, 0, self._max_width))
        return GraphShape((decodes,)), GraphShape((self._largest_lane(0),))

    @property
    def most_visitors(self) -> int:
        """Rotating rows that a layer of any graph may have."""
        return self._visitors[-1]

    def fits(self, lane: SubBatch) -> bool:
        """Return whether there are shapes for such a sub-batch, but for its rotating rows."""
        prefills = lane.gprf + lane.cprf
        if any(item.num_scored for item in prefills):
            return False
        if sum(self._pool.blocks_for(item.end) for item in lane.cprf) > self.num_staging_blocks:
            return False
        num_tokens = len(lane.gdec) + sum(item.num_tokens for item in prefills)
        return not prefills or num_tokens <= self._tokens[-1]

    def choose(
        self, lanes: Sequence[SubBatch], most_visiting: int, known: Collection[GraphShape]
    ) -> GraphShape:
        """Return the shape of a step's graph.

        Args:
            lanes: The step.
            most_visiting: Most rotating rows that are in a layer together.
            known: Shapes that graphs have been captured for.
        """
        wanted = self.exact(lanes, most_visiting)
        if wanted.recurs or wanted in known:
            return wanted
        needed = self._shape(lanes, most_visiting, is_padded=False)
        taken = min(
            (shape for shape in known if shape.holds(needed)),
            key=lambda shape: shape.num_rows,
            default=None,
        )
        roomy = self.roomy(wanted)
        if taken is None:
            return roomy
        better = roomy if roomy.num_rows < taken.num_rows else wanted
        self._spared[better] += 1 + _cost(taken.num_rows) - _cost(better.num_rows)
        if self._spared[better] <= CAPTURE_ROWS:
            return taken
        del self._spared[better]
        return better

    def usual(self, *, rotates: bool) -> list[GraphShape]:
        """Return roomy shapes that most steps with prompts fit, and most that rotate rows.

        Worth capturing before there are requests that would wait for it.

        Args:
            rotates: Whether rows may rotate.
        """
        top = self._tokens[-1]
        sizes = sorted({_at_least(self._tokens, min(number, top)) for number in _USUAL_TOKENS})
        mixed = [LaneShape(device=self._mixed(size)) for size in sizes]
        shapes = [GraphShape((lane,)) for lane in mixed]
        if not rotates:
            return shapes
        visitors = [_at_least(self._visitors, min(n, self._visitors[-1])) for n in _USUAL_VISITORS]
        most = visitors[-1]
        bounds = zip((0, *USUAL_DECODES), USUAL_DECODES, strict=False)
        decodes = [PagedShape(), *(self._decodes_between(low + 1, high) for low, high in bounds)]
        lanes = [LaneShape(device=self._mixed(size - most)) for size in sizes]
        shares = [top // 4, top // 2]
        on_device = [*decodes, *(self._mixed(padded_tiles(share)) for share in shares)]
        lanes += [
            self._filled(size, device, most)
            for size in sizes
            for device in on_device
            if device.num_tokens + most < size
        ]
        shapes += [_with_visitors(lane, most) for lane in dict.fromkeys(lanes)]
        begun = [self._filled(size, device, 0) for size in sizes[1:] for device in decodes]
        shapes += [GraphShape((lane,)) for lane in dict.fromkeys(begun)]
        rows = [LaneShape(device=device) for device in dict.fromkeys(decodes)]
        return shapes + [_with_visitors(lane, n) for lane in rows for n in dict.fromkeys(visitors)]

    def _filled(self, num_rows: int, device: PagedShape, num_visitors: int) -> LaneShape:
        """Return a lane of so many rows, the rest of them prompts that go to the host."""
        num_tokens = num_rows - device.num_tokens - num_visitors
        prefills = PagedShape(num_tokens, 0, self._prefills[0], self._max_width)
        return LaneShape(
            device=device,
            host_prefills=prefills,
            num_prefix=self._prefixes[0] if self._uses_staging else 0,
            num_written=self._num_written(prefills),
        )

    def _decodes_between(self, least: int, most: int) -> PagedShape:
        """Return room for any number of decodes between two, of any length."""
        least, most = (_at_least(self._few_rows, min(n, self._few_rows[-1])) for n in (least, most))
        return PagedShape(most, most, 0, self._max_width, self._most_splits(least))

    def _mixed(self, num_tokens: int) -> PagedShape:
        """Return room for prefill chunks and some decodes, of so many tokens together."""
        most = self._mixed_decodes[0]
        splits = self._most_splits(most)
        return PagedShape(max(num_tokens, most), most, self._prefills[0], self._max_width, splits)

    def _most_splits(self, num_decodes: int) -> int:
        longest = self._max_width * self._pool.block_size
        return _doubled(self._backend.num_decode_splits(num_decodes, longest))

    def exact(self, lanes: Sequence[SubBatch], most_visiting: int) -> GraphShape:
        """Return the smallest shape that holds a step."""
        num_visitors = _at_least(self._visitors, most_visiting) if most_visiting else 0
        if num_visitors and any(lane.gprf or lane.cprf for lane in lanes):
            # A few rows more are nothing beside a prompt, and more steps share a graph.
            num_visitors = _doubled(max(num_visitors, PROMPT_VISITORS), self._visitors[-1])
        return self._shape(lanes, num_visitors)

    def _shape(
        self, lanes: Sequence[SubBatch], num_visitors: int, *, is_padded: bool = True
    ) -> GraphShape:
        """Return a step's shape, its rows filling tiles or as many as they are."""
        alone = len(lanes) == 1
        shapes = [
            self._lane_shape(lane, num_visitors, alone=alone, is_padded=is_padded) for lane in lanes
        ]
        return GraphShape(tuple(shapes), num_visitors)

    def roomy(self, shape: GraphShape) -> GraphShape:
        """Return one that also holds many other steps of the kind."""
        num_visitors = _doubled(shape.num_visitors, self._visitors[-1])
        lanes = tuple(self._roomy_lane(lane, num_visitors) for lane in shape.lanes)
        return GraphShape(lanes, num_visitors)

    def _roomy_lane(self, lane: LaneShape, num_visitors: int) -> LaneShape:
        device, host = lane.device, lane.host_prefills
        num_entering = num_visitors if lane.num_entering else 0
        num_host_decodes = _doubled(lane.num_host_decodes, self._few_rows[-1])
        if device.num_prefills:
            num_tokens = self._doubled_room(device.num_tokens, num_entering)
            device = replace(device, num_tokens=num_tokens)
        device = replace(device, num_splits=_doubled(device.num_splits))
        if host.num_tokens:
            others = device.num_tokens + num_host_decodes + num_entering
            host = replace(host, num_tokens=self._doubled_room(host.num_tokens, others))
        return replace(
            lane,
            device=device,
            host_prefills=host,
            num_prefix=lane.num_prefix,
            num_written=self._num_written(host),
            num_host_decodes=num_host_decodes,
            num_entering=num_entering,
        )

    def _doubled_room(self, num_tokens: int, others: int) -> int:
        alone = _doubled(num_tokens, self._tokens[-1])
        return min(_doubled(num_tokens + others) - others, alone)

    def _largest_lane(self, num_host_tokens: int) -> LaneShape:
        """Return the largest lane, with so many tokens that go to the host."""
        most, num_prefills = self._tokens[-1], self._prefills[-1]
        host = PagedShape(num_host_tokens, 0, num_prefills, self._staging_width)
        return LaneShape(
            device=PagedShape(most, self._mixed_decodes[-1], num_prefills, self._max_width),
            host_prefills=host,
            num_prefix=self.num_staging_blocks if num_host_tokens else 0,
            num_written=self.num_staging_blocks if num_host_tokens else 0,
            num_host_decodes=self._few_rows[-1] if num_host_tokens else 0,
        )

    def _lane_shape(
        self, lane: SubBatch, num_entering: int, *, alone: bool, is_padded: bool
    ) -> LaneShape:
        gdec, gprf, cprf, cdec = lane.gdec, lane.gprf, lane.cprf, lane.cdec
        ladder = self._decodes if alone and not (cprf or cdec or num_entering) else self._few_rows
        num_decodes = len(gdec)
        num_tokens = num_decodes + sum(item.num_tokens for item in gprf)
        num_host_tokens = sum(item.num_tokens for item in cprf)
        num_host_decodes = _at_least(self._few_rows, len(cdec)) if cdec else 0
        longest = max((item.end for item in gdec), default=1)
        most_decodes = 0
        if gdec or gprf:
            most_decodes = _at_least(self._mixed_decodes if gprf else ladder, num_decodes)
        num_splits = self._backend.num_decode_splits(most_decodes, longest)
        if gprf and is_padded:
            num_decodes = most_decodes
            num_tokens = max(num_tokens, num_decodes)
            num_tokens = padded_tiles(num_tokens) if cprf else self._room(num_tokens, num_entering)
            num_tokens = min(num_tokens, self._tokens[-1])
        elif gdec and is_padded:
            num_decodes = num_tokens = most_decodes
        if cprf and is_padded:
            others = num_tokens + num_host_decodes + num_entering
            num_host_tokens = self._room(num_host_tokens, others)
        device = PagedShape(
            num_tokens,
            num_decodes,
            _at_least(self._prefills, len(gprf)) if gprf else 0,
            self._filler.width(gdec + gprf, self._max_width),
            num_splits,
        )
        host, num_prefix = PagedShape(), 0
        if cprf:
            num_prefills = _at_least(self._prefills, len(cprf))
            width = self._filler.width(cprf, self._max_width)
            host = PagedShape(num_host_tokens, 0, num_prefills, width)
            num_blocks = sum(self._pool.blocks_for(item.start) for item in cprf)
            if self._uses_staging and num_blocks:
                num_prefix = _at_least(self._prefixes, num_blocks)
        return LaneShape(
            device=device,
            host_prefills=host,
            num_prefix=num_prefix,
            num_written=self._num_written(host),
            num_host_decodes=num_host_decodes,
            num_entering=num_entering,
        )

    def _room(self, num_tokens: int, others: int) -> int:
        """Return the room for tokens of prompts that makes whole tiles of all rows."""
        rows = num_tokens + others
        total = next((step for step in self._tokens if step >= rows), padded_tiles(rows))
        return min(total - others, self._tokens[-1])

    def _num_written(self, host: PagedShape) -> int:
        """Return the staging blocks that chunks are copied from; one may end within a block."""
        if not (host.num_tokens and self._uses_staging):
            return 0
        most = self._pool.blocks_for(host.num_tokens) + 2 * host.num_prefills
        return min(most, self.num_staging_blocks)


def _cost(num_rows: int) -> int:
    """Return what a graph takes, in rows."""
    return num_rows if num_rows <= _FEW_ROWS else num_rows + _BEYOND_FEW_ROWS


def _with_visitors(lane: LaneShape, number: int) -> GraphShape:
    return GraphShape((replace(lane, num_entering=number),), number)


def row_ladder(most: int) -> list[int]:
    """Return the numbers of rows that graphs of decodes are made for."""
    return _steps([1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 64)], most)


def token_ladder(most: int, least_most: int) -> list[int]:
    """Return the numbers of tokens that graphs of mixed steps are made for.

    Args:
        most: The longest step.
        least_most: The ladder goes at least so far.
    """
    most = max(whole_tiles(most), least_most)
    return _steps([padded_tiles(rows) for rows in range(64, most + 1, 64)], most)


def _steps(steps: Sequence[int], most: int) -> list[int]:
    return sorted({min(step, most) for step in [*steps, most]})


def _at_least(ladder: Sequence[int], number: int) -> int:
    return next(step for step in ladder if step >= number)


def _doubled(number: int, most: int | None = None) -> int:
    """Return the next power of two, at most `most`; 0 for 0."""
    doubled = 1 << (number - 1).bit_length() if number else 0
    return doubled if most is None else min(most, doubled)
