"""One sub-batch's metadata in a static buffer: room for a shape, filled step by step.

What a captured graph reads lies at fixed addresses, so a step is copied there, with rows to spare:
they have length 0, store nothing and attend to nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import Batch, HostDecodeRows, PagedRows, RotatingRows
from engine.batch_arrays import input_ids_of, positions_of, slots_of, sources_of
from engine.kv_blocks import BlockPool
from engine.request import Request
from engine.step_plan import ScheduledRequest, SubBatch
from engine.table_rows import TableRows
from engine.token_feedback import NO_SOURCE
from engine.upload import Ints

_LEAST_WIDTH = 64
_NO_SLOT = -1
_OF_EVERY_ROW = ("input_ids", "positions", "sources")


@dataclass(frozen=True, slots=True)
class LaneShape:
    """What there is room for in a sub-batch.

    Args:
        num_tokens: Tokens of device-resident requests, T.
        num_decodes: Their decodes, D, at most T.
        num_prefills: Their prefill chunks, S.
        width: Blocks of a row of the block tables.
        num_splits: Into how many splits decode attention cuts a request.
        num_host_decodes: Decodes of host-resident requests, which come behind the T tokens.
        num_entering: Rotating rows that enter, which come last.
    """

    num_tokens: int
    num_decodes: int
    num_prefills: int
    width: int
    num_splits: int
    num_host_decodes: int = 0
    num_entering: int = 0

    @property
    def num_seqs(self) -> int:
        """Rows of the block tables."""
        return self.num_decodes + self.num_prefills

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self.num_tokens + self.num_host_decodes + self.num_entering

    def arrays(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the sub-batch's arrays, those of larger elements first."""
        return {
            "input_ids": ((self.num_rows,), torch.int64),
            "positions": ((self.num_rows,), torch.int64),
            "sources": ((self.num_rows,), torch.int64),
            "slot_mapping": ((self.num_tokens,), torch.int64),
            "seq_lens": ((self.num_seqs,), torch.int32),
            "prefill_starts": ((self.num_prefills + 1,), torch.int32),
            "block_tables": ((self.num_seqs, self.width), torch.int32),
        }


class LaneFiller:
    """Writes sub-batches to arrays of a shape.

    Args:
        pool: Accounting of the device's blocks.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._tables = TableRows(pool)

    def width(self, items: Sequence[ScheduledRequest], most: int) -> int:
        """Return the width of block tables that holds some shares, one of a few."""
        longest = max((item.end for item in items), default=0)
        width = _LEAST_WIDTH
        while width * self._pool.block_size < longest:
            width *= 2
        return min(width, most)

    def fill(
        self, views: dict[str, Ints], sub_batch: SubBatch, source: Callable[[Request], int]
    ) -> None:
        """Write a sub-batch.

        Args:
            views: `LaneShape.arrays`, with room for them.
            sub_batch: What to compute.
            source: Says where a request's pending token is.
        """
        gdec, gprf = sub_batch.gdec, sub_batch.gprf
        num_tokens = len(views["slot_mapping"])
        resident = {name: view[:num_tokens] for name, view in views.items()}
        if gprf:
            _fill_tokens(resident, gdec + gprf, source)
        else:
            _fill_decodes(resident, gdec, source)
        self._fill_slots(views["slot_mapping"], gdec, gprf)
        behind = {name: views[name][num_tokens:] for name in _OF_EVERY_ROW}
        entering = [row.share for row in sub_batch.rotating if row.layer is None]
        _fill_decodes(behind, sub_batch.cdec + entering, source)
        seq_lens, tables = views["seq_lens"], views["block_tables"]
        first = len(seq_lens) - (len(views["prefill_starts"]) - 1)
        for at, items in ((0, gdec), (first, gprf)):
            for row, item in enumerate(items, start=at):
                blocks = self._blocks(item)
                tables[row, : len(blocks)] = blocks
        seq_lens[:] = 0
        seq_lens[: len(gdec)] = [item.end for item in gdec]
        seq_lens[first : first + len(gprf)] = [item.end for item in gprf]
        starts = np.cumsum([len(gdec), *(item.num_tokens for item in gprf)])
        views["prefill_starts"][: len(starts)] = starts
        views["prefill_starts"][len(starts) :] = starts[-1]

    def _blocks(self, item: ScheduledRequest) -> Ints:
        return self._tables.row(item.request.request_id, self._pool.blocks_for(item.end))

    def _fill_slots(
        self, slots: Ints, gdec: Sequence[ScheduledRequest], gprf: Sequence[ScheduledRequest]
    ) -> None:
        size, count = self._pool.block_size, len(gdec)
        ends = np.asarray([item.end for item in gdec], dtype=np.int64)
        last_blocks = np.asarray([self._blocks(item)[-1] for item in gdec], dtype=np.int64)
        slots[:count] = last_blocks * size + (ends - 1) % size
        for item in gprf:
            slots[count : count + item.num_tokens] = slots_of(item, self._blocks(item), size)
            count += item.num_tokens
        slots[count:] = _NO_SLOT


def _fill_tokens(
    views: dict[str, Ints],
    items: Sequence[ScheduledRequest],
    source: Callable[[Request], int],
) -> None:
    sources = sources_of(items, source)
    count = sum(item.num_tokens for item in items)
    for name, values, spare in (
        ("input_ids", input_ids_of(items), 0),
        ("positions", positions_of(items), 0),
        ("sources", NO_SOURCE if sources is None else sources, NO_SOURCE),
    ):
        views[name][:count] = values
        views[name][count:] = spare


def _fill_decodes(
    views: dict[str, Ints],
    items: Sequence[ScheduledRequest],
    source: Callable[[Request], int],
) -> None:
    """Do as `_fill_tokens` does, in a third of the time: this is the path of every decode."""
    count = len(items)
    known = [not item.request.num_pending_tokens for item in items]
    ids = [item.request.last_token_id if k else 0 for item, k in zip(items, known, strict=True)]
    sources = [
        NO_SOURCE if k else source(item.request) for item, k in zip(items, known, strict=True)
    ]
    for name, values, spare in (
        ("input_ids", ids, 0),
        ("positions", [item.start for item in items], 0),
        ("sources", sources, NO_SOURCE),
    ):
        views[name][:count] = values
        views[name][count:] = spare


def batch_of(
    shape: LaneShape,
    views: dict[str, torch.Tensor],
    *,
    block_size: int,
    filled: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rotating: RotatingRows | None = None,
) -> Batch:
    """Return a sub-batch that reads a static buffer.

    Args:
        shape: What there is room for.
        views: Its arrays, on the device.
        block_size: Tokens of a block.
        filled: Puts pending tokens in their places; see `TokenFeedback.filled`.
        rotating: The rotating rows.
    """
    rows = PagedRows(
        num_decodes=shape.num_decodes,
        slot_mapping=views["slot_mapping"],
        prefill_cu_seqlens_q=views["prefill_starts"],
        seq_lens=views["seq_lens"],
        block_tables=views["block_tables"],
        max_decode_len=shape.width * block_size,
        num_splits=shape.num_splits,
    )
    return Batch(
        input_ids=filled(views["input_ids"], views["sources"]),
        positions=views["positions"],
        logits_rows=None,
        device_rows=rows,
        host_decodes=_room(shape.num_host_decodes) if shape.num_host_decodes else None,
        rotating=rotating,
    )


def _room(num_rows: int) -> HostDecodeRows:
    """Return host-resident decodes that nobody looks at: the CPU is told of the real ones."""
    none = torch.zeros(num_rows, dtype=torch.int32)
    return HostDecodeRows(block_tables=none.unsqueeze(1), seq_lens=none)
