"""Decode steps as CUDA graphs: one launch instead of hundreds, captured from the eager code.

A graph is made for a number of rows, a width of block tables and a number of attention splits. A
step takes the smallest that holds it; rows to spare have length 0, store nothing and attend to
nothing. Every step's metadata goes to static buffers by one copy from pinned memory. Graphs are
captured when they are first needed and share one pool of memory, because they never run at once.

On a device without graphs the same buffers feed the eager code, which is for tests.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.backends import Backend
from engine.batch import Batch, PagedRows
from engine.kv_blocks import BlockPool
from engine.models import DecoderModel
from engine.sampler import PendingTokens, is_plainly_greedy, launch_sampling
from engine.step_plan import ScheduledRequest, StepPlan
from engine.table_rows import TableRows
from engine.token_feedback import NO_SOURCE, TokenFeedback
from engine.upload import Ints

MAX_GRAPHS = 128
_NUM_UPLOADS = 2
"""A buffer is written while at most one earlier step is still on its way."""
_LEAST_WIDTH = 64
_NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a graph is captured for: rows, blocks of a table row, attention splits."""

    num_rows: int
    width: int
    num_splits: int


class _Fields:
    """The arrays of a step inside one buffer, for one number of rows and width.

    Args:
        num_rows: Rows.
        width: Blocks of a table row.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        self.shapes = {
            "input_ids": ((num_rows,), 8),
            "positions": ((num_rows,), 8),
            "slot_mapping": ((num_rows,), 8),
            "sources": ((num_rows,), 8),
            "seq_lens": ((num_rows + num_rows % 2,), 4),
            "block_tables": ((num_rows, width), 4),
        }
        self.num_bytes = sum(size * int(np.prod(shape)) for shape, size in self.shapes.values())

    def cut(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of a buffer of bytes."""
        views, start = {}, 0
        for name, (shape, size) in self.shapes.items():
            end = start + size * int(np.prod(shape))
            dtype = torch.int64 if size == 8 else torch.int32
            views[name] = buffer[start:end].view(dtype).view(shape)
            start = end
        return views


class DecodeGraphs:
    """Launches steps that only decode device-resident requests.

    Args:
        model: The model.
        backend: Its backend, whose pool is allocated.
        pool: Accounting of the device's blocks.
        feedback: Where sampled tokens go and come from.
        max_num_seqs: Most rows.
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
        max_model_len: int,
    ) -> None:
        self._model = model
        self._backend = backend
        self._pool = pool
        self._feedback = feedback
        self._tables = TableRows(pool)
        self._ladder = row_ladder(max_num_seqs)
        self._max_width = pool.blocks_for(max_model_len)
        device = backend.device
        num_bytes = _Fields(max_num_seqs, self._max_width).num_bytes
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

    @staticmethod
    def fits(plan: StepPlan) -> bool:
        """Return whether a step is one of device-resident decodes only."""
        has_others = len(plan.sub_batches) > 1 or bool(plan.rotating)
        return not has_others and len(plan.sub_batches[0].gdec) == plan.num_tokens

    @torch.inference_mode()
    def launch(self, items: Sequence[ScheduledRequest]) -> PendingTokens:
        """Compute a step and sample.

        Args:
            items: Decodes of device-resident requests.

        Returns:
            Their next tokens; they are also in the feedback.
        """
        shape = self._shape(items)
        self._upload(shape, items)
        if self._uses_graphs:
            self._graph(shape).replay()
        else:
            self._compute(shape)
        requests = [item.request for item in items]
        if all(is_plainly_greedy(request) for request in requests):
            return PendingTokens(self._feedback.token_ids[: len(items)])
        tokens = launch_sampling(self._logits[: len(items)], requests)
        self._feedback.keep(tokens.token_ids)
        return tokens

    def capture_largest(self) -> None:
        """Capture the graph that takes the most memory."""
        self._graph(GraphShape(self._ladder[-1], self._max_width, 1))

    def _shape(self, items: Sequence[ScheduledRequest]) -> GraphShape:
        num_rows = next(rows for rows in self._ladder if rows >= len(items))
        longest = max(item.end for item in items)
        width = _LEAST_WIDTH
        while width * self._pool.block_size < longest:
            width *= 2
        num_splits = self._backend.num_decode_splits(num_rows, longest)
        return GraphShape(num_rows, min(width, self._max_width), num_splits)

    def _upload(self, shape: GraphShape, items: Sequence[ScheduledRequest]) -> None:
        fields = _Fields(shape.num_rows, shape.width)
        upload = self._uploads[self._num_launched % _NUM_UPLOADS]
        self._num_launched += 1
        views = {name: view.numpy() for name, view in fields.cut(upload).items()}
        self._fill(views, items)
        size = fields.num_bytes
        self._static[:size].copy_(upload[:size], non_blocking=True)

    def _fill(self, views: dict[str, Ints], items: Sequence[ScheduledRequest]) -> None:
        count, size = len(items), self._pool.block_size
        ends = np.asarray([item.end for item in items])
        known = [not item.request.num_pending_tokens for item in items]
        ids = [item.request.last_token_id if k else 0 for item, k in zip(items, known, strict=True)]
        source = self._feedback.source
        sources = [
            NO_SOURCE if k else source(item.request) for item, k in zip(items, known, strict=True)
        ]
        tables = views["block_tables"]
        last_blocks = np.empty(count, dtype=np.int64)
        for row, item in enumerate(items):
            num_blocks = self._pool.blocks_for(item.end)
            blocks = self._tables.row(item.request.request_id, num_blocks)
            tables[row, :num_blocks] = blocks
            last_blocks[row] = blocks[num_blocks - 1]
        for name, values, spare in (
            ("input_ids", ids, 0),
            ("positions", ends - 1, 0),
            ("slot_mapping", last_blocks * size + (ends - 1) % size, _NO_SLOT),
            ("sources", sources, NO_SOURCE),
            ("seq_lens", ends, 0),
        ):
            views[name][:count] = values
            views[name][count:] = spare

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
        batch = self._batch(shape)
        self._backend.begin_step([batch])
        [logits] = self._model.forward([batch])
        self._logits[: shape.num_rows].copy_(logits)
        self._feedback.keep(logits.argmax(dim=-1))

    def _batch(self, shape: GraphShape) -> Batch:
        views = _Fields(shape.num_rows, shape.width).cut(self._static)
        rows = PagedRows(
            num_decodes=shape.num_rows,
            slot_mapping=views["slot_mapping"],
            prefill_cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device=self._backend.device),
            seq_lens=views["seq_lens"][: shape.num_rows],
            block_tables=views["block_tables"],
            query_lens=[1] * shape.num_rows,
            context_lens=[shape.width * self._pool.block_size] * shape.num_rows,
            num_splits=shape.num_splits,
        )
        return Batch(
            input_ids=self._feedback.filled(views["input_ids"], views["sources"]),
            positions=views["positions"],
            logits_rows=None,
            device_rows=rows,
        )


def row_ladder(most: int) -> list[int]:
    """Return the numbers of rows that graphs are captured for, up to and including `most`."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 64)]
    return sorted({min(rows, most) for rows in [*steps, most]})
