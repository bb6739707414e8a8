"""One sub-batch's metadata in a static buffer: room for a shape, filled step by step.

What a captured graph reads lies at fixed addresses, so a step is copied there, with rows to spare:
they have length 0, store nothing and attend to nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import (
    Batch,
    HostDecodeRows,
    HostPrefillRows,
    PagedRows,
    RotatingRows,
    StagedCopy,
)
from engine.batch_arrays import (
    input_ids_of,
    positions_of,
    slots_of,
    sources_of,
    staged_blocks_of,
)
from engine.batch_builder import BatchBuilder
from engine.request import Request
from engine.step_plan import ScheduledRequest, SubBatch
from engine.token_feedback import NO_SOURCE
from engine.upload import Ints

Arrays = dict[str, tuple[tuple[int, ...], torch.dtype]]
_LEAST_WIDTH = 64
_NOWHERE = -1
"""The slot, or block, of what is not to be stored or copied."""


@dataclass(frozen=True, slots=True)
class PagedShape:
    """Room for rows of one pool.

    Args:
        num_tokens: Tokens.
        num_decodes: Decodes among them, at most as many.
        num_prefills: Prefill chunks.
        width: Blocks of a row of the block tables.
        num_splits: Into how many splits decode attention cuts a request.
    """

    num_tokens: int = 0
    num_decodes: int = 0
    num_prefills: int = 0
    width: int = _LEAST_WIDTH
    num_splits: int = 1

    @property
    def num_seqs(self) -> int:
        """Rows of the block tables."""
        return self.num_decodes + self.num_prefills

    def arrays(self, name: str) -> Arrays:
        """Return the arrays of the rows, whose names begin with `name`."""
        return {
            f"{name}.slot_mapping": ((self.num_tokens,), torch.int64),
            f"{name}.seq_lens": ((self.num_seqs,), torch.int32),
            f"{name}.prefill_starts": ((self.num_prefills + 1,), torch.int32),
            f"{name}.block_tables": ((self.num_seqs, self.width), torch.int32),
        }

    def rows(self, name: str, views: dict[str, torch.Tensor], block_size: int) -> PagedRows:
        """Return rows that read their arrays."""
        return PagedRows(
            num_decodes=self.num_decodes,
            slot_mapping=views[f"{name}.slot_mapping"],
            prefill_cu_seqlens_q=views[f"{name}.prefill_starts"],
            seq_lens=views[f"{name}.seq_lens"],
            block_tables=views[f"{name}.block_tables"],
            max_decode_len=self.width * block_size,
            num_splits=self.num_splits,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneShape:
    """What there is room for in a sub-batch, in the order of its rows.

    Args:
        device: Rows of device-resident requests.
        host_prefills: Prefill chunks that go to the host.
        num_prefix: Blocks of them that are copied to staging before.
        num_written: Blocks of them that are copied from staging after.
        num_host_decodes: Decodes of host-resident requests.
        num_entering: Rotating rows that enter.
    """

    device: PagedShape = PagedShape()
    host_prefills: PagedShape = PagedShape()
    num_prefix: int = 0
    num_written: int = 0
    num_host_decodes: int = 0
    num_entering: int = 0

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self.first_host_decode + self.num_host_decodes + self.num_entering

    @property
    def first_host_decode(self) -> int:
        """Where decodes of host-resident requests begin."""
        return self.device.num_tokens + self.host_prefills.num_tokens

    @property
    def first_entering(self) -> int:
        """Where rotating rows that enter begin."""
        return self.first_host_decode + self.num_host_decodes

    @property
    def only_decodes(self) -> bool:
        """Whether all rows are decodes of device-resident requests."""
        return self.num_rows == self.device.num_decodes and not self.device.num_prefills

    @property
    def most_sampled(self) -> int:
        """Rows that may get a token."""
        num_paged = self.device.num_seqs + self.host_prefills.num_seqs
        return num_paged + self.num_host_decodes + self.num_entering

    def arrays(self) -> Arrays:
        """Return the sub-batch's arrays."""
        return {
            "input_ids": ((self.num_rows,), torch.int64),
            "positions": ((self.num_rows,), torch.int64),
            "sources": ((self.num_rows,), torch.int64),
            **self.device.arrays("device"),
            **self.host_prefills.arrays("host"),
            "prefix.staging": ((self.num_prefix,), torch.int32),
            "prefix.host": ((self.num_prefix,), torch.int32),
            "written.staging": ((self.num_written,), torch.int32),
            "written.host": ((self.num_written,), torch.int32),
        }


class LaneFiller:
    """Writes sub-batches to arrays of a shape.

    Args:
        builder: Knows the requests' blocks.
    """

    def __init__(self, builder: BatchBuilder) -> None:
        self._builder = builder

    def width(self, items: Sequence[ScheduledRequest], most: int) -> int:
        """Return the width of block tables that holds some shares, one of a few."""
        longest = max((item.end for item in items), default=0)
        width = _LEAST_WIDTH
        while width * self._builder.block_size < longest:
            width *= 2
        return min(width, most)

    def fill(
        self,
        shape: LaneShape,
        views: dict[str, Ints],
        sub_batch: SubBatch,
        source: Callable[[Request], int],
    ) -> None:
        """Write a sub-batch.

        Args:
            shape: Has room for it.
            views: Its arrays.
            sub_batch: What to compute.
            source: Says where a request's pending token is.
        """
        entering = [row.share for row in sub_batch.rotating if row.layer is None]
        for first, end, items in (
            (0, shape.device.num_tokens, sub_batch.gdec + sub_batch.gprf),
            (shape.device.num_tokens, shape.first_host_decode, sub_batch.cprf),
            (shape.first_host_decode, shape.first_entering, sub_batch.cdec),
            (shape.first_entering, shape.num_rows, entering),
        ):
            _fill_tokens({name: views[name][first:end] for name in _OF_EVERY_ROW}, items, source)
        tables = [self._builder.device_table(item) for item in sub_batch.gdec + sub_batch.gprf]
        self._fill_paged("device", shape.device, views, (sub_batch.gdec, sub_batch.gprf), tables)
        if shape.host_prefills.num_tokens:
            self._fill_host_prefills(shape, views, sub_batch.cprf)

    def _fill_host_prefills(
        self, shape: LaneShape, views: dict[str, Ints], items: Sequence[ScheduledRequest]
    ) -> None:
        host_tables = self._builder.host_tables(items)
        staged = staged_blocks_of(items, host_tables, self._builder.block_size)
        tables = staged.tables if self._builder.uses_staging else host_tables
        self._fill_paged("host", shape.host_prefills, views, ([], items), tables)
        for name, pair in (("prefix", staged.prefix), ("written", staged.written)):
            for side, ids in zip(("staging", "host"), pair, strict=True):
                view = views[f"{name}.{side}"]
                if len(view):
                    view[: len(ids)] = ids
                    view[len(ids) :] = _NOWHERE

    def _fill_paged(
        self,
        name: str,
        shape: PagedShape,
        views: dict[str, Ints],
        items: tuple[Sequence[ScheduledRequest], Sequence[ScheduledRequest]],
        tables: Sequence[Ints],
    ) -> None:
        decodes, prefills = items
        seq_lens, block_tables = views[f"{name}.seq_lens"], views[f"{name}.block_tables"]
        places = [*range(len(decodes)), *range(shape.num_decodes, shape.num_seqs)]
        for row, table in zip(places, tables, strict=False):
            block_tables[row, : len(table)] = table
        seq_lens[:] = 0
        seq_lens[: len(decodes)] = [item.end for item in decodes]
        first = shape.num_decodes
        seq_lens[first : first + len(prefills)] = [item.end for item in prefills]
        starts = np.cumsum([len(decodes), *(item.num_tokens for item in prefills)])
        views[f"{name}.prefill_starts"][: len(starts)] = starts
        views[f"{name}.prefill_starts"][len(starts) :] = starts[-1]
        self._fill_slots(views[f"{name}.slot_mapping"], decodes, prefills, tables)

    def _fill_slots(
        self,
        slots: Ints,
        decodes: Sequence[ScheduledRequest],
        prefills: Sequence[ScheduledRequest],
        tables: Sequence[Ints],
    ) -> None:
        size, count = self._builder.block_size, len(decodes)
        starts = np.asarray([item.start for item in decodes], dtype=np.int64)
        last_blocks = np.asarray([table[-1] for table in tables[:count]], dtype=np.int64)
        slots[:count] = last_blocks * size + starts % size
        for item, table in zip(prefills, tables[count:], strict=True):
            slots[count : count + item.num_tokens] = slots_of(item, table, size)
            count += item.num_tokens
        slots[count:] = _NOWHERE


_OF_EVERY_ROW = ("input_ids", "positions", "sources")


def _fill_tokens(
    views: dict[str, Ints],
    items: Sequence[ScheduledRequest],
    source: Callable[[Request], int],
) -> None:
    if not len(views["input_ids"]):
        return
    count = sum(item.num_tokens for item in items)
    ids, positions, sources = (
        _decodes(items, source) if count == len(items) else _chunks(items, source)
    )
    for name, values, spare in (
        ("input_ids", ids, 0),
        ("positions", positions, 0),
        ("sources", sources, NO_SOURCE),
    ):
        views[name][:count] = values
        views[name][count:] = spare


def _chunks(
    items: Sequence[ScheduledRequest], source: Callable[[Request], int]
) -> tuple[Ints, Ints, Ints | int]:
    sources = sources_of(items, source)
    return input_ids_of(items), positions_of(items), NO_SOURCE if sources is None else sources


def _decodes(
    items: Sequence[ScheduledRequest], source: Callable[[Request], int]
) -> tuple[list[int], list[int], list[int]]:
    """Do as `_chunks` does where each has one token: faster, and what most steps need."""
    ids, sources = [], []
    for item in items:
        request = item.request
        pending = request.num_pending_tokens
        is_newest = item.end == request.num_tokens
        is_pending = bool(pending) and is_newest
        ids.append(0 if is_pending else request.token_ids(item.start, item.end)[0])
        sources.append(source(request) if is_pending else NO_SOURCE)
    return ids, [item.start for item in items], sources


def batch_of(
    shape: LaneShape,
    views: dict[str, torch.Tensor],
    *,
    block_size: int,
    sampled: torch.Tensor,
    num_staging_blocks: int = 0,
    rotating: RotatingRows | None = None,
) -> Batch:
    """Return a sub-batch that reads a static buffer.

    Args:
        shape: What there is room for.
        views: Its arrays, on the device.
        block_size: Tokens of a block.
        sampled: The last step's tokens; see `TokenFeedback`.
        num_staging_blocks: Staging blocks that prompts to the host may take.
        rotating: The rotating rows.
    """
    prefills = None
    if shape.host_prefills.num_tokens:
        prefix = StagedCopy(staging_ids=views["prefix.staging"], host_ids=views["prefix.host"])
        written = StagedCopy(staging_ids=views["written.staging"], host_ids=views["written.host"])
        prefills = HostPrefillRows(
            rows=shape.host_prefills.rows("host", views, block_size),
            num_staging_blocks=num_staging_blocks,
            prefix=prefix if shape.num_prefix else None,
            written=written if shape.num_written else None,
        )
    return Batch(
        input_ids=views["input_ids"],
        positions=views["positions"],
        logits_rows=None,
        device_rows=shape.device.rows("device", views, block_size),
        host_prefills=prefills,
        host_decodes=_room(shape.num_host_decodes) if shape.num_host_decodes else None,
        rotating=rotating,
        sources=views["sources"],
        sampled=sampled,
    )


def _room(num_rows: int) -> HostDecodeRows:
    """Return host-resident decodes that nobody looks at: the CPU is told of the real ones."""
    none = torch.zeros(num_rows, dtype=torch.int32)
    return HostDecodeRows(block_tables=none.unsqueeze(1), seq_lens=none)
