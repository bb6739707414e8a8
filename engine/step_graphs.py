"""Steps as CUDA graphs: one launch instead of hundreds, captured from the eager code.

A graph is made for a shape (see `engine.shape_chooser`), which may have more room than steps need.
A step's metadata goes to static buffers by one copy from pinned memory. Graphs are captured when
they are first needed and share one pool of memory, because they never run at once.

On a device without graphs the same buffers feed the eager code, which is for tests.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.backends import Backend, SlottedTokens
from engine.batch import DirectRows, HostWork, RotatingRows
from engine.batch_arrays import rotating_positions_of
from engine.batch_builder import BatchBuilder
from engine.direct_rows import ENTRY_FIELDS, MAX_DIRECT_BLOCKS, num_entries
from engine.graph_ladders import GraphLadders
from engine.graph_shape import GraphShape
from engine.kv_blocks import BlockPool
from engine.lane_fields import LaneFiller, batch_of
from engine.models import DecoderModel
from engine.rotation import Rotation, RotationPlaces, most_visitors
from engine.sampler import PendingTokens, is_plainly_greedy, launch_sampling
from engine.shape_chooser import ShapeChooser
from engine.step_plan import StepPlan, SubBatch
from engine.token_feedback import TokenFeedback
from engine.transfer import WrittenToHost
from engine.upload import Ints
from engine.usual_shapes import UsualShapes

MAX_GRAPHS = 256
_NUM_UPLOADS = 2
"""A step's metadata is written, and its tokens arrive, while at most one other is on its way."""
_ALIGNMENT = 8
_NUM_ROTATING_ARRAYS = 3
"""Positions, slots and answers."""
_Array = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Views:
    """A buffer's arrays."""

    slot: torch.Tensor
    sampled: torch.Tensor
    rotating: list[torch.Tensor]
    direct: list[torch.Tensor]
    lanes: list[dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostArrays:
    """The same for writing, and what they take."""

    slot: Ints
    sampled: Ints
    rotating: list[Ints]
    direct: list[Ints]
    lanes: list[dict[str, Ints]]
    num_bytes: int


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
        self._ladders = GraphLadders(
            backend,
            pool,
            uses_staging=builder.uses_staging,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_model_len=max_model_len,
            most_visitors=most_visitors(model.config.num_layers, max_num_seqs),
        )
        self._shapes = ShapeChooser(backend, builder, pool, self._ladders)
        num_bytes = self._num_bytes(self._shapes.largest)
        device = backend.device
        self._static = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._uploads = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for _ in range(_NUM_UPLOADS)
        ]
        self._tokens_on_host = torch.zeros(
            _NUM_UPLOADS, max_num_seqs, dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self._host_views: dict[tuple[GraphShape, int], _HostArrays] = {}
        self._num_launched = 0
        embedding = model.weights.embedding
        self._logits = embedding.new_empty(max_num_seqs, model.weights.lm_head.shape[0])
        self._graphs: OrderedDict[GraphShape, torch.cuda.CUDAGraph | None] = OrderedDict()
        self.num_captured = 0
        self.num_rows = 0
        """Of the graph that was launched last, rows to spare included."""
        self._uses_graphs = device.type == "cuda"
        if self._uses_graphs:
            self._memory = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def fits(self, plan: StepPlan) -> bool:
        """Return whether a step is one that graphs are made for."""
        return self._most_visiting(plan) <= self._ladders.visitors[-1] and all(
            self._shapes.fits(lane) for lane in _lanes(plan)
        )

    def _most_visiting(self, plan: StepPlan) -> int:
        return 0 if self._rotation is None else self._rotation.most_at_once(plan.rotating)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingTokens:
        """Compute a step and sample.

        Args:
            plan: One that fits.

        Returns:
            New tokens in batch order; they are also in the feedback.
        """
        lanes, rotation = _lanes(plan), self._rotation
        shape = self._shapes.choose(lanes, self._most_visiting(plan), self._graphs)
        self.num_rows = shape.num_rows
        places = None
        if plan.rotating:
            assert rotation is not None, "rotating rows need a rotation"
            places = rotation.advance(plan.rotating, shape.num_visitors)
            self._builder.note_entering(places)
        slot = self._upload(shape, lanes, places)
        self._backend.begin_host(
            HostWork(
                [self._builder.host_decodes(lane.cdec) for lane in lanes],
                None if places is None else self._builder.rotating_lanes(places),
            )
        )
        graph = self._graph(shape)
        if graph is None:
            self._compute(shape)
        else:
            graph.replay()
        requests = [item.request for item in plan.sampling]
        if all(is_plainly_greedy(request) for request in requests):
            token_ids = self._feedback.token_ids[: len(requests)]
            on_host = WrittenToHost(self._tokens_on_host[slot, : len(requests)], token_ids.device)
            return PendingTokens(token_ids, on_host=on_host)
        tokens = launch_sampling(self._logits[: len(requests)], requests)
        self._feedback.keep(tokens.token_ids)
        return tokens

    def capture_hungriest(self) -> None:
        """Capture the graphs that take the most memory."""
        for shape in self._shapes.hungriest:
            self._graph(shape)

    def capture_usual(self, *, rotates: bool) -> None:
        """Capture graphs that most steps with prompts fit, and most that rotate rows."""
        for shape in UsualShapes(self._ladders).shapes(rotates=rotates):
            self._graph(shape)

    def _num_sampled(self, shape: GraphShape) -> int:
        """Return the room for rows that sample; 0 if all rows do, in order."""
        if len(shape.lanes) == 1 and shape.lanes[0].only_decodes:
            return 0
        return min(sum(lane.most_sampled for lane in shape.lanes), self._max_num_seqs)

    def _arrays(self, shape: GraphShape) -> list[_Array]:
        """Return all arrays: where tokens go, who samples, rotating rows', those of each lane."""
        num_rotating = shape.num_visitors * (self._model.config.num_layers + 1)
        arrays: list[_Array] = [((1,), torch.int64), ((self._num_sampled(shape),), torch.int64)]
        arrays += [((num_rotating,), torch.int64)] * _NUM_ROTATING_ARRAYS
        arrays += self._direct_arrays(shape)
        return arrays + [array for lane in shape.lanes for array in lane.arrays().values()]

    def _direct_arrays(self, shape: GraphShape) -> list[_Array]:
        """Return those of rotating rows that the device attends to, where there can be any."""
        rotation = self._rotation
        if rotation is None or rotation.direct is None or not shape.num_visitors:
            return []
        num_segments = len(rotation.segments)
        entries = (num_segments, ENTRY_FIELDS, num_entries(rotation.segments, shape.num_visitors))
        return [(entries, torch.int32), ((num_segments, MAX_DIRECT_BLOCKS), torch.int32)]

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
            slot=next(left),
            sampled=next(left),
            rotating=[next(left) for _ in range(_NUM_ROTATING_ARRAYS)],
            direct=[next(left) for _ in self._direct_arrays(shape)],
            lanes=[dict(zip(lane.arrays(), left, strict=False)) for lane in shape.lanes],
        )

    def _upload(
        self, shape: GraphShape, lanes: Sequence[SubBatch], places: RotationPlaces | None
    ) -> int:
        """Fill the buffer that the graph reads, and return the slot of its tokens."""
        number = self._num_launched % _NUM_UPLOADS
        self._num_launched += 1
        arrays = self._host_arrays(shape, number)
        for room, lane, views in zip(shape.lanes, lanes, arrays.lanes, strict=True):
            self._filler.fill(room, views, lane, self._feedback.source)
        arrays.slot[:] = number
        if len(arrays.sampled):
            rows = _sampled_rows(lanes, shape)
            arrays.sampled[: len(rows)] = rows
            arrays.sampled[len(rows) :] = 0
        if places is not None:
            positions, slots, answers = arrays.rotating
            positions[:] = rotating_positions_of(places)
            slots[:], answers[:] = places.slots, places.answers
            if arrays.direct:
                self._builder.fill_direct(places, *arrays.direct)
        size = arrays.num_bytes
        self._static[:size].copy_(self._uploads[number][:size], non_blocking=True)
        return number

    def _host_arrays(self, shape: GraphShape, number: int) -> _HostArrays:
        """Return a shape's arrays in an upload buffer; cutting them takes a millisecond."""
        found = self._host_views.get((shape, number))
        if found is None:
            if len(self._host_views) >= _NUM_UPLOADS * MAX_GRAPHS:
                self._host_views.clear()
            views = self._cut(shape, self._uploads[number])
            found = self._host_views[shape, number] = _HostArrays(
                slot=views.slot.numpy(),
                sampled=views.sampled.numpy(),
                rotating=[view.numpy() for view in views.rotating],
                direct=[view.numpy() for view in views.direct],
                lanes=[{name: view.numpy() for name, view in n.items()} for n in views.lanes],
                num_bytes=self._num_bytes(shape),
            )
        return found

    def _graph(self, shape: GraphShape) -> torch.cuda.CUDAGraph | None:
        """Return a shape's graph; None on a device without graphs."""
        if shape not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                if self._uses_graphs:
                    torch.cuda.current_stream(self._backend.device).synchronize()
                self._graphs.popitem(last=False)
            self._graphs[shape] = self._capture(shape) if self._uses_graphs else None
            self.num_captured += self._uses_graphs
        self._graphs.move_to_end(shape)
        return self._graphs[shape]

    @torch.inference_mode()
    def _capture(self, shape: GraphShape) -> torch.cuda.CUDAGraph:
        for number, lane in enumerate(shape.lanes):
            if lane.num_written:
                self._backend.reserve_staging(number, self._ladders.num_staging_blocks)
        if shape.num_visitors and self._rotation is not None:
            self._backend.reserve_rotation(len(self._rotation.segments))
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
        size, feedback = self._pool.block_size, self._feedback.token_ids
        rotating = self._rotating_rows(shape, views)
        batches = [
            batch_of(
                lane,
                arrays,
                block_size=size,
                sampled=feedback,
                num_staging_blocks=self._ladders.num_staging_blocks,
                rotating=rotating,
            )
            for lane, arrays in zip(shape.lanes, views.lanes, strict=True)
        ]
        self._backend.announce(batches)
        lanes = self._model.run_layers(batches)
        states = lanes[0] if len(lanes) == 1 else torch.cat(lanes)
        if len(views.sampled):
            states = states[views.sampled]
        logits = self._model.logits(states, out=self._logits[: len(states)])
        on_host = SlottedTokens(self._tokens_on_host, views.slot)
        self._backend.greedy_tokens(logits, feedback[: len(states)], on_host)
        self._backend.join_copies()

    def _rotating_rows(self, shape: GraphShape, views: _Views) -> RotatingRows | None:
        if not shape.num_visitors:
            return None
        assert self._rotation is not None, "rotating rows need a rotation"
        positions, slots, answers = views.rotating
        direct = None
        if views.direct:
            entries, blocks = views.direct
            direct = DirectRows(entries=entries, blocks=blocks)
        return RotatingRows(
            bounds=range(0, positions.shape[0] + 1, shape.num_visitors),
            segments=self._rotation.segments,
            lanes=[None] * len(self._rotation.segments),
            positions=positions,
            slots=slots,
            residuals=self._rotation.residuals,
            answers=answers,
            direct=direct,
        )


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
