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
from dataclasses import replace

from engine.backends import Backend
from engine.batch_builder import BatchBuilder
from engine.graph_ladders import GraphLadders, at_least, doubled
from engine.graph_limits import PROMPT_VISITORS, padded_tiles
from engine.graph_shape import GraphShape
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


class ShapeChooser:
    """Chooses shapes for steps.

    Args:
        backend: Says how attention is split.
        builder: Says whether prompts go to the host by way of staging blocks.
        pool: Accounting of the device's blocks.
        ladders: The numbers that shapes have.
    """

    def __init__(
        self, backend: Backend, builder: BatchBuilder, pool: BlockPool, ladders: GraphLadders
    ) -> None:
        self._backend = backend
        self._pool = pool
        self._filler = LaneFiller(builder)
        self._ladders = ladders
        self._spared: Counter[GraphShape] = Counter()

    @property
    def largest(self) -> GraphShape:
        """What has room for every step: two lanes of all kinds of rows."""
        lane = self._largest_lane(self._ladders.tokens[-1])
        return GraphShape((lane, lane), self._ladders.visitors[-1])

    @property
    def hungriest(self) -> tuple[GraphShape, GraphShape]:
        """Those on the device that take the most memory: decodes only, and with prompts."""
        most = self._ladders.decodes[-1]
        decodes = LaneShape(device=PagedShape(most, most, 0, self._ladders.max_width))
        return GraphShape((decodes,)), GraphShape((self._largest_lane(0),))

    def fits(self, lane: SubBatch) -> bool:
        """Return whether there are shapes for such a sub-batch, but for its rotating rows."""
        prefills = lane.gprf + lane.cprf
        if any(item.num_scored for item in prefills):
            return False
        num_staged = sum(self._pool.blocks_for(item.end) for item in lane.cprf)
        if num_staged > self._ladders.num_staging_blocks:
            return False
        num_tokens = len(lane.gdec) + sum(item.num_tokens for item in prefills)
        return not prefills or num_tokens <= self._ladders.tokens[-1]

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
            key=lambda shape: (shape.num_rows, shape.num_prefix),
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

    def exact(self, lanes: Sequence[SubBatch], most_visiting: int) -> GraphShape:
        """Return the smallest shape that holds a step."""
        num_visitors = at_least(self._ladders.visitors, most_visiting) if most_visiting else 0
        if num_visitors and any(lane.gprf or lane.cprf for lane in lanes):
            # A few rows more are nothing beside a prompt, and more steps share a graph.
            num_visitors = doubled(max(num_visitors, PROMPT_VISITORS), self._ladders.visitors[-1])
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
        num_visitors = doubled(shape.num_visitors, self._ladders.visitors[-1])
        lanes = tuple(self._roomy_lane(lane, num_visitors) for lane in shape.lanes)
        return GraphShape(lanes, num_visitors)

    def _roomy_lane(self, lane: LaneShape, num_visitors: int) -> LaneShape:
        ladders, device, host = self._ladders, lane.device, lane.host_prefills
        num_entering = num_visitors if lane.num_entering else 0
        num_host_decodes = doubled(lane.num_host_decodes, ladders.few_rows[-1])
        if device.num_prefills:
            num_tokens = ladders.doubled_room(device.num_tokens, num_entering)
            device = replace(device, num_tokens=num_tokens)
        device = replace(device, num_splits=doubled(device.num_splits))
        if host.num_tokens:
            others = device.num_tokens + num_host_decodes + num_entering
            host = replace(host, num_tokens=ladders.doubled_room(host.num_tokens, others))
        return replace(
            lane,
            device=device,
            host_prefills=host,
            num_written=ladders.num_written(host),
            num_host_decodes=num_host_decodes,
            num_entering=num_entering,
        )

    def _largest_lane(self, num_host_tokens: int) -> LaneShape:
        """Return the largest lane, with so many tokens that go to the host."""
        ladders = self._ladders
        most, num_prefills, width = ladders.tokens[-1], ladders.prefills[-1], ladders.max_width
        num_blocks = ladders.num_staging_blocks
        device = PagedShape(most, ladders.mixed_decodes[-1], num_prefills, width)
        host = PagedShape(num_host_tokens, 0, num_prefills, min(num_blocks, width))
        if not num_host_tokens:
            return LaneShape(device=device, host_prefills=host)
        return LaneShape(
            device=device,
            host_prefills=host,
            num_prefix=num_blocks,
            num_written=num_blocks,
            num_host_decodes=ladders.few_rows[-1],
        )

    def _lane_shape(
        self, lane: SubBatch, num_entering: int, *, alone: bool, is_padded: bool
    ) -> LaneShape:
        ladders, cprf, cdec = self._ladders, lane.cprf, lane.cdec
        only_decodes = alone and not (cprf or cdec or num_entering)
        decodes = ladders.decodes if only_decodes else ladders.few_rows
        device = self._device_rows(lane, decodes, num_entering, is_padded=is_padded)
        num_host_decodes = at_least(ladders.few_rows, len(cdec)) if cdec else 0
        host, num_prefix = PagedShape(), 0
        if cprf:
            num_tokens = sum(item.num_tokens for item in cprf)
            if is_padded:
                others = device.num_tokens + num_host_decodes + num_entering
                num_tokens = ladders.room(num_tokens, others)
            width = self._filler.width(cprf, ladders.max_width)
            host = PagedShape(num_tokens, 0, at_least(ladders.prefills, len(cprf)), width)
            num_blocks = sum(self._pool.blocks_for(item.start) for item in cprf)
            if ladders.uses_staging and num_blocks:
                num_prefix = at_least(ladders.prefixes, num_blocks)
        return LaneShape(
            device=device,
            host_prefills=host,
            num_prefix=num_prefix,
            num_written=ladders.num_written(host),
            num_host_decodes=num_host_decodes,
            num_entering=num_entering,
        )

    def _device_rows(
        self, lane: SubBatch, decodes: Sequence[int], num_entering: int, *, is_padded: bool
    ) -> PagedShape:
        """Return room for a lane's device-resident rows, `decodes` being the ladder of those."""
        ladders, gdec, gprf = self._ladders, lane.gdec, lane.gprf
        num_decodes = len(gdec)
        num_tokens = num_decodes + sum(item.num_tokens for item in gprf)
        most_decodes = 0
        if gdec or gprf:
            most_decodes = at_least(ladders.mixed_decodes if gprf else decodes, num_decodes)
        longest = max((item.end for item in gdec), default=1)
        num_splits = self._backend.num_decode_splits(most_decodes, longest)
        if gdec and not gprf:
            # Rows to spare do not fill the GPU, prompts do. Whole powers of two: few graphs.
            wanted = self._backend.num_decode_splits(num_decodes, longest)
            num_splits = max(num_splits, 1 << (wanted.bit_length() - 1))
        if gprf and is_padded:
            num_decodes = most_decodes
            rows = max(num_tokens, num_decodes)
            rows = padded_tiles(rows) if lane.cprf else ladders.room(rows, num_entering)
            num_tokens = min(rows, ladders.tokens[-1])
        elif gdec and is_padded:
            num_decodes = num_tokens = most_decodes
        num_prefills = at_least(ladders.prefills, len(gprf)) if gprf else 0
        width = self._filler.width(gdec + gprf, ladders.max_width)
        return PagedShape(num_tokens, num_decodes, num_prefills, width, num_splits)


def _cost(num_rows: int) -> int:
    """Return what a graph takes, in rows."""
    return num_rows if num_rows <= _FEW_ROWS else num_rows + _BEYOND_FEW_ROWS
