"""Steps as CUDA graphs: one launch instead of hundreds, captured from the eager code.

A graph is made for a shape: numbers of tokens, of decodes and prefill chunks, a width of block
tables, a number of attention splits. A step takes the smallest shape that holds it. Every step's
metadata goes to static buffers by one copy from pinned memory. Graphs are captured when they are
first needed and share one pool of memory, because they never run at once.

On a device without graphs the same buffers feed the eager code, which is for tests.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from engine.backends import Backend
from engine.graph_limits import MAX_GRAPH_TOKENS
from engine.kv_blocks import BlockPool
from engine.lane_fields import LaneFiller, LaneShape, batch_of
from engine.models import DecoderModel
from engine.sampler import PendingTokens, is_plainly_greedy, launch_sampling
from engine.step_plan import ScheduledRequest, StepPlan, SubBatch
from engine.token_feedback import TokenFeedback
from engine.upload import Ints

MAX_GRAPHS = 256
_NUM_UPLOADS = 2
"""A buffer is written while at most one earlier step is still on its way."""
_ALIGNMENT = 8

GraphShape = LaneShape


class StepGraphs:
    """Launches steps of device-resident requests that are not too long.

    Args:
        model: The model.
        backend: Its backend, whose pool is allocated.
        pool: Accounting of the device's blocks.
        feedback: Where sampled tokens go and come from.
        max_num_seqs: Most requests of a step.
        max_num_tokens: Most tokens of a step.
        max_model_len: Most tokens of a request.
    """

    def __init__(
        self,
        model: DecoderModel,
        backend: Backend,
        pool: BlockPool,
        feedback: TokenFeedback,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._backend = backend
        self._pool = pool
        self._feedback = feedback
        self._filler = LaneFiller(pool)
        self._max_num_seqs = max_num_seqs
        self._rows = row_ladder(max_num_seqs)
        self._mixed_rows = _steps([32, 64, 128], max_num_seqs)
        self._prefills = _steps([4, 16, 64], max_num_seqs)
        self._tokens = token_ladder(min(max_num_tokens, MAX_GRAPH_TOKENS), max_num_seqs)
        self._max_width = pool.blocks_for(max_model_len)
        self._largest = LaneShape(
            self._tokens[-1], self._mixed_rows[-1], self._prefills[-1], self._max_width, 1
        )
        num_bytes = self._num_bytes(self._largest)
        device = backend.device
        self._static = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._uploads = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for _ in range(_NUM_UPLOADS)
        ]
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
        if len(plan.sub_batches) > 1 or plan.rotating:
            return False
        [batch] = plan.sub_batches
        if batch.cprf or batch.cdec or any(item.num_scored for item in batch.gprf):
            return False
        return not batch.gprf or batch.num_tokens <= self._tokens[-1]

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingTokens:
        """Compute a step and sample.

        Args:
            plan: One that fits.

        Returns:
            New tokens in batch order; they are also in the feedback.
        """
        [sub_batch] = plan.sub_batches
        shape = self._shape(sub_batch)
        self._upload(shape, sub_batch)
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
        self._graph(LaneShape(self._rows[-1], self._rows[-1], 0, self._max_width, 1))
        self._graph(self._largest)

    def _shape(self, sub_batch: SubBatch) -> GraphShape:
        gdec, gprf = sub_batch.gdec, sub_batch.gprf
        width = self._filler.width(gdec + gprf, self._max_width)
        if gprf:
            num_decodes = _at_least(self._mixed_rows, len(gdec))
            num_tokens = _at_least(self._tokens, max(sub_batch.num_tokens, num_decodes))
        else:
            num_decodes = num_tokens = _at_least(self._rows, len(gdec))
        longest = max((item.end for item in gdec), default=1)
        num_splits = self._backend.num_decode_splits(num_decodes, longest)
        num_prefills = _at_least(self._prefills, len(gprf)) if gprf else 0
        return LaneShape(num_tokens, num_decodes, num_prefills, width, num_splits)

    def _num_sampled(self, shape: GraphShape) -> int:
        """Return the room for rows that sample; 0 if all rows do, in order."""
        return min(shape.num_seqs, self._max_num_seqs) if shape.num_prefills else 0

    def _arrays(self, shape: GraphShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"logits_rows": ((self._num_sampled(shape),), torch.int64), **shape.arrays()}

    def _num_bytes(self, shape: GraphShape) -> int:
        return sum(_size(array, dtype) for array, dtype in self._arrays(shape).values())

    def _cut(self, shape: GraphShape, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a shape's arrays as views of a buffer of bytes."""
        views, start = {}, 0
        for name, (array, dtype) in self._arrays(shape).items():
            end = start + int(np.prod(array)) * dtype.itemsize
            views[name] = buffer[start:end].view(dtype).view(array)
            start += _size(array, dtype)
        return views

    def _upload(self, shape: GraphShape, sub_batch: SubBatch) -> None:
        upload = self._uploads[self._num_launched % _NUM_UPLOADS]
        self._num_launched += 1
        views: dict[str, Ints] = {
            name: view.numpy() for name, view in self._cut(shape, upload).items()
        }
        self._filler.fill(views, sub_batch, self._feedback.source)
        if shape.num_prefills:
            rows = _sampled_rows(sub_batch.resident)
            views["logits_rows"][: len(rows)] = rows
            views["logits_rows"][len(rows) :] = 0
        size = self._num_bytes(shape)
        self._static[:size].copy_(upload[:size], non_blocking=True)

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
        size = self._pool.block_size
        batch = batch_of(shape, views, block_size=size, filled=self._feedback.filled)
        self._backend.begin_step([batch])
        [states] = self._model.run_layers([batch])
        if shape.num_prefills:
            states = states.select(views["logits_rows"])
        logits = self._model.logits(states.hidden, states.residual, None)
        self._logits[: logits.shape[0]].copy_(logits)
        self._feedback.keep(logits.argmax(dim=-1))


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
    return _steps([*range(64, 512, 64), *range(512, most + 1, 128)], most)


def _steps(steps: Sequence[int], most: int) -> list[int]:
    return sorted({min(step, most) for step in [*steps, most]})


def _at_least(ladder: Sequence[int], number: int) -> int:
    return next(step for step in ladder if step >= number)


def _size(array: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of an array in a buffer."""
    return -(-int(np.prod(array)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _sampled_rows(items: Sequence[ScheduledRequest]) -> list[int]:
    ends = np.cumsum([0, *(item.num_tokens for item in items)])
    return [
        int(end) - 1 for item, (_, end) in zip(items, pairwise(ends), strict=True) if item.samples
    ]
