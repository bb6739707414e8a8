"""Steps as CUDA graphs: one launch instead of hundreds, captured from the eager code.

A graph is made for a shape: numbers of tokens, of decodes and prefill chunks, a width of block
tables, a number of attention splits. A step takes the smallest shape that holds it. Every step's
metadata goes to static buffers by one copy from pinned memory. Graphs are captured when they are
first needed and share one pool of memory, because they never run at once.

On a device without graphs the same buffers feed the eager code, which is for tests.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.backends import Backend
from engine.batch import HostWork, RotatingRows
from engine.batch_arrays import rotating_positions_of
from engine.batch_builder import BatchBuilder
from engine.graph_limits import MAX_GRAPH_TOKENS, MAX_STAGED_TOKENS
from engine.kv_blocks import BlockPool
from engine.lane_fields import LaneFiller, LaneShape, PagedShape, batch_of
from engine.models import DecoderModel
from engine.rotation import Rotation, RotationPlaces
from engine.sampler import PendingTokens, is_plainly_greedy, launch_sampling
from engine.step_plan import StepPlan, SubBatch
from engine.token_feedback import TokenFeedback
from engine.upload import Ints

MAX_GRAPHS = 256
_NUM_UPLOADS = 2
"""A buffer is written while at most one earlier step is still on its way."""
_ALIGNMENT = 8
_NUM_ROTATING_ARRAYS = 3
"""Positions, slots and answers."""
_Array = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Views:
    """A buffer's arrays."""

    sampled: torch.Tensor
    rotating: list[torch.Tensor]
    lanes: list[dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostArrays:
    """The same for writing, and what they take."""

    sampled: Ints
    rotating: list[Ints]
    lanes: list[dict[str, Ints]]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a graph is captured for.

    Args:
        lanes: Its sub-batches.
        num_visitors: Rotating rows that every layer has room for.
    """

    lanes: tuple[LaneShape, ...]
    num_visitors: int = 0


class StepGraphs:
    """Launches steps that are not too long, of any mode.

    Args:
        model: The model.
        backend: Its backend, whose pool is allocated.
        builder: Says what the CPU attends to.
        pool: Accounting of the device's blocks.
        feedback: Where sampled tokens go and come from.
        rotation: The rows that rotate; None if none do.
        max_num_seqs: Most requests of a step.
        max_num_tokens: Most tokens of a step.
        max_model_len: Most tokens of a request.
    """

    def __init__(
        self,
        model: DecoderModel,
        backend: Backend,
        builder: BatchBuilder,
        pool: BlockPool,
        feedback: TokenFeedback,
        rotation: Rotation | None,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._backend = backend
        self._builder = builder
        self._pool = pool
        self._feedback = feedback
        self._rotation = rotation
        self._filler = LaneFiller(builder)
        self._max_num_seqs = max_num_seqs
        self._decodes = row_ladder(max_num_seqs)
        self._few_rows = _steps([8, 16, 24, 32, 48, 64, 96, 128, 192], max_num_seqs)
        self._visitors = _steps([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128], max_num_seqs)
        self._mixed_decodes = _steps([32, 64, 128], max_num_seqs)
        self._prefills = _steps([4, 16, 64], max_num_seqs)
        self._tokens = token_ladder(min(max_num_tokens, MAX_GRAPH_TOKENS), max_num_seqs)
        self._max_width = pool.blocks_for(max_model_len)
        self._staging_blocks = pool.blocks_for(MAX_STAGED_TOKENS)
        prefixes = [n for n in (16, 64) if n < self._staging_blocks]
        self._prefixes = [0, *prefixes, self._staging_blocks]
        self._staging_width = min(self._staging_blocks, self._max_width)
        # Two lanes of device-resident rows take more room than anything else.
        largest = self._largest(self._tokens[-1])
        num_bytes = self._num_bytes(GraphShape((largest, largest), self._visitors[-1]))
        device = backend.device
        self._static = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._uploads = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for _ in range(_NUM_UPLOADS)
        ]
        self._host_views: dict[tuple[GraphShape, int], _HostArrays] = {}
        self._num_launched = 0
        embedding = model.weights.embedding
        self._logits = embedding.new_empty(max_num_seqs, model.weights.lm_head.shape[0])
        self._graphs: OrderedDict[GraphShape, torch.cuda.CUDAGraph] = OrderedDict()
        self._uses_graphs = device.type == "cuda"
        if self._uses_graphs:
            self._memory = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def fits(self, plan: StepPlan) -> bool:
        """Return whether a step is one that graphs are made for."""
        return all(self._fits(lane) for lane in _lanes(plan))

    def _fits(self, lane: SubBatch) -> bool:
        prefills = lane.gprf + lane.cprf
        if any(item.num_scored for item in prefills):
            return False
        if sum(self._pool.blocks_for(item.end) for item in lane.cprf) > self._staging_blocks:
            return False
        num_tokens = len(lane.gdec) + sum(item.num_tokens for item in prefills)
        return not prefills or num_tokens <= self._tokens[-1]

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingTokens:
        """Compute a step and sample.

        Args:
            plan: One that fits.

        Returns:
            New tokens in batch order; they are also in the feedback.
        """
        lanes = _lanes(plan)
        shape = self._shape(lanes)
        places = None
        if plan.rotating:
            assert self._rotation is not None, "rotating rows need a rotation"
            places = self._rotation.advance(plan.rotating, shape.num_visitors)
        self._upload(shape, lanes, places)
        self._backend.begin_host(
            HostWork(
                [self._builder.host_decodes(lane.cdec) for lane in lanes],
                None if places is None else self._builder.rotating_lanes(places),
            )
        )
        if self._uses_graphs:
            self._graph(shape).replay()
        else:
            self._compute(shape)
        requests = [item.request for item in plan.sampling]
        if all(is_plainly_greedy(request) for request in requests):
            return PendingTokens(self._feedback.token_ids[: len(requests)])
        tokens = launch_sampling(self._logits[: len(requests)], requests)
        self._feedback.keep(tokens.token_ids)
        return tokens

    def capture_largest(self) -> None:
        """Capture the graphs that take the most memory."""
        most = self._decodes[-1]
        decodes = LaneShape(device=PagedShape(most, most, 0, self._max_width))
        for lane in (decodes, self._largest(0)):
            self._graph(GraphShape((lane,)))

    def _largest(self, num_host_tokens: int) -> LaneShape:
        """Return the largest lane, with so many tokens that go to the host."""
        most, num_prefills = self._tokens[-1], self._prefills[-1]
        host = PagedShape(num_host_tokens, 0, num_prefills, self._staging_width)
        return LaneShape(
            device=PagedShape(most, self._mixed_decodes[-1], num_prefills, self._max_width),
            host_prefills=host,
            num_prefix=self._staging_blocks if num_host_tokens else 0,
            num_written=self._staging_blocks if num_host_tokens else 0,
            num_host_decodes=self._few_rows[-1] if num_host_tokens else 0,
        )

    def _shape(self, lanes: Sequence[SubBatch]) -> GraphShape:
        num_visitors = 0
        if lanes[0].rotating:
            assert self._rotation is not None, "rotating rows need a rotation"
            most = self._rotation.most_at_once(lanes[0].rotating)
            num_visitors = _at_least(self._visitors, most)
        alone = len(lanes) == 1
        shapes = tuple(self._lane_shape(lane, num_visitors, alone=alone) for lane in lanes)
        return GraphShape(shapes, num_visitors)

    def _lane_shape(self, lane: SubBatch, num_entering: int, *, alone: bool) -> LaneShape:
        gdec, gprf, cprf, cdec = lane.gdec, lane.gprf, lane.cprf, lane.cdec
        ladder = self._decodes if alone and not (cprf or cdec or num_entering) else self._few_rows
        if gprf:
            num_decodes = _at_least(self._mixed_decodes, len(gdec))
            wanted = len(gdec) + sum(item.num_tokens for item in gprf)
            num_tokens = _at_least(self._tokens, max(wanted, num_decodes))
        else:
            num_decodes = num_tokens = _at_least(ladder, len(gdec)) if gdec else 0
        longest = max((item.end for item in gdec), default=1)
        device = PagedShape(
            num_tokens,
            num_decodes,
            _at_least(self._prefills, len(gprf)) if gprf else 0,
            self._filler.width(gdec + gprf, self._max_width),
            self._backend.num_decode_splits(num_decodes, longest),
        )
        host, num_prefix, num_written = PagedShape(), 0, 0
        if cprf:
            num_tokens = _at_least(self._tokens, sum(item.num_tokens for item in cprf))
            num_prefills = _at_least(self._prefills, len(cprf))
            host = PagedShape(
                num_tokens, 0, num_prefills, self._filler.width(cprf, self._max_width)
            )
            if self._builder.uses_staging:
                prefix = sum(self._pool.blocks_for(item.start) for item in cprf)
                num_prefix = _at_least(self._prefixes, prefix)
                # A chunk may begin and end within a block.
                num_written = self._pool.blocks_for(num_tokens) + 2 * num_prefills
        return LaneShape(
            device=device,
            host_prefills=host,
            num_prefix=num_prefix,
            num_written=num_written,
            num_host_decodes=_at_least(self._few_rows, len(cdec)) if cdec else 0,
            num_entering=num_entering,
        )

    def _num_sampled(self, shape: GraphShape) -> int:
        """Return the room for rows that sample; 0 if all rows do, in order."""
        if len(shape.lanes) == 1 and shape.lanes[0].only_decodes:
            return 0
        return min(sum(lane.most_sampled for lane in shape.lanes), self._max_num_seqs)

    def _arrays(self, shape: GraphShape) -> list[_Array]:
        """Return all arrays: the rows that sample, the rotating rows', those of each lane."""
        num_rotating = shape.num_visitors * (self._model.config.num_layers + 1)
        arrays: list[_Array] = [((self._num_sampled(shape),), torch.int64)]
        arrays += [((num_rotating,), torch.int64)] * _NUM_ROTATING_ARRAYS
        return arrays + [array for lane in shape.lanes for array in lane.arrays().values()]

    def _num_bytes(self, shape: GraphShape) -> int:
        return sum(_size(array) for array in self._arrays(shape))

    def _cut(self, shape: GraphShape, buffer: torch.Tensor) -> _Views:
        """Return a shape's arrays as views of a buffer of bytes."""
        views, start = [], 0
        for array in self._arrays(shape):
            size, dtype = array
            end = start + int(np.prod(size)) * dtype.itemsize
            views.append(buffer[start:end].view(dtype).view(size))
            start += _size(array)
        left = iter(views)
        return _Views(
            sampled=next(left),
            rotating=[next(left) for _ in range(_NUM_ROTATING_ARRAYS)],
            lanes=[dict(zip(lane.arrays(), left, strict=False)) for lane in shape.lanes],
        )

    def _upload(
        self, shape: GraphShape, lanes: Sequence[SubBatch], places: RotationPlaces | None
    ) -> None:
        number = self._num_launched % _NUM_UPLOADS
        self._num_launched += 1
        arrays = self._host_arrays(shape, number)
        for room, lane, views in zip(shape.lanes, lanes, arrays.lanes, strict=True):
            self._filler.fill(room, views, lane, self._feedback.source)
        if len(arrays.sampled):
            rows = _sampled_rows(lanes, shape)
            arrays.sampled[: len(rows)] = rows
            arrays.sampled[len(rows) :] = 0
        if places is not None:
            positions, slots, answers = arrays.rotating
            positions[:] = rotating_positions_of(places)
            slots[:], answers[:] = places.slots, places.answers
        size = arrays.num_bytes
        self._static[:size].copy_(self._uploads[number][:size], non_blocking=True)

    def _host_arrays(self, shape: GraphShape, number: int) -> _HostArrays:
        """Return a shape's arrays in an upload buffer; cutting them takes a millisecond."""
        found = self._host_views.get((shape, number))
        if found is None:
            if len(self._host_views) >= _NUM_UPLOADS * MAX_GRAPHS:
                self._host_views.clear()
            views = self._cut(shape, self._uploads[number])
            found = self._host_views[shape, number] = _HostArrays(
                sampled=views.sampled.numpy(),
                rotating=[view.numpy() for view in views.rotating],
                lanes=[{name: view.numpy() for name, view in n.items()} for n in views.lanes],
                num_bytes=self._num_bytes(shape),
            )
        return found

    def _graph(self, shape: GraphShape) -> torch.cuda.CUDAGraph:
        graph = self._graphs.get(shape)
        if graph is None:
            if len(self._graphs) >= MAX_GRAPHS:
                torch.cuda.current_stream(self._backend.device).synchronize()
                self._graphs.popitem(last=False)
            graph = self._graphs[shape] = self._capture(shape)
        self._graphs.move_to_end(shape)
        return graph

    @torch.inference_mode()
    def _capture(self, shape: GraphShape) -> torch.cuda.CUDAGraph:
        for number, lane in enumerate(shape.lanes):
            if lane.num_written:
                self._backend.reserve_staging(number, self._staging_blocks)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._backend.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                self._compute(shape)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph

    def _compute(self, shape: GraphShape) -> None:
        """Run the model over the static buffers."""
        views = self._cut(shape, self._static)
        size, filled = self._pool.block_size, self._feedback.filled
        rotating = self._rotating_rows(shape, views)
        batches = [
            batch_of(
                lane,
                arrays,
                block_size=size,
                filled=filled,
                num_staging_blocks=self._staging_blocks,
                rotating=rotating,
            )
            for lane, arrays in zip(shape.lanes, views.lanes, strict=True)
        ]
        self._backend.announce(batches)
        lanes = self._model.run_layers(batches)
        self._backend.join_copies()
        hidden, residual = lanes[0].hidden, lanes[0].residual
        if len(lanes) > 1:
            hidden = torch.cat([lane.hidden for lane in lanes])
            residual = torch.cat([lane.residual for lane in lanes])
        rows = views.sampled if views.sampled.shape[0] else None
        logits = self._model.logits(hidden, residual, rows)
        self._logits[: logits.shape[0]].copy_(logits)
        self._feedback.keep(logits.argmax(dim=-1))

    def _rotating_rows(self, shape: GraphShape, views: _Views) -> RotatingRows | None:
        if not shape.num_visitors:
            return None
        assert self._rotation is not None, "rotating rows need a rotation"
        positions, slots, answers = views.rotating
        return RotatingRows(
            bounds=range(0, positions.shape[0] + 1, shape.num_visitors),
            segments=self._rotation.segments,
            lanes=[None] * len(self._rotation.segments),
            positions=positions,
            slots=slots,
            residuals=self._rotation.residuals,
            answers=answers,
        )


def row_ladder(most: int) -> list[int]:
    """Return the numbers of rows that graphs of decodes are made for."""
    return _steps([1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 64)], most)


def token_ladder(most: int, least_most: int) -> list[int]:
    """Return the numbers of tokens that graphs of mixed steps are made for.

    Args:
        most: The longest step.
        least_most: The ladder goes at least so far.
    """
    most = max(most, least_most)
    return _steps(range(64, most + 1, 64), most)


def _steps(steps: Sequence[int], most: int) -> list[int]:
    return sorted({min(step, most) for step in [*steps, most]})


def _at_least(ladder: Sequence[int], number: int) -> int:
    return next(step for step in ladder if step >= number)


def _size(array: _Array) -> int:
    """Return what an array takes in a buffer."""
    size, dtype = array
    return -(-int(np.prod(size)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _lanes(plan: StepPlan) -> list[SubBatch]:
    return [sub_batch for sub_batch in plan.sub_batches if not sub_batch.is_empty]


def _sampled_rows(lanes: Sequence[SubBatch], shape: GraphShape) -> list[int]:
    """Return where the rows that sample are, among those of all lanes."""
    rows, first = [], 0
    for lane, room in zip(lanes, shape.lanes, strict=True):
        groups = (
            (0, lane.gdec + lane.gprf),
            (room.device.num_tokens, lane.cprf),
            (room.first_host_decode, lane.cdec),
        )
        for start, items in groups:
            row = first + start
            for item in items:
                row += item.num_tokens
                if item.samples:
                    rows.append(row - 1)
        # Those that rejoin behind the last layer take the places of those that entered.
        num_rejoining = sum(row.samples for row in lane.rotating)
        rows += range(first + room.first_entering, first + room.first_entering + num_rejoining)
        first += room.num_rows
    return rows
