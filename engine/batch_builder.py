"""From a sub-batch of a step plan to tensors: tokens, positions, slots, tables in one upload."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.batch import (
    Batch,
    DirectRows,
    HostDecodeRows,
    HostPrefillRows,
    PagedRows,
    RotatingRows,
    ScoredRows,
    StagedCopy,
)
from engine.batch_arrays import (
    input_ids_of,
    positions_of,
    rotating_positions_of,
    slots_of,
    sources_of,
    staged_blocks_of,
)
from engine.direct_rows import ENTRY_FIELDS, num_blocks_of
from engine.kv_blocks import BlockPool
from engine.request import Request
from engine.rotation import Rotation, RotationPlaces
from engine.step_plan import ScheduledRequest, SubBatch
from engine.table_rows import TableRows
from engine.upload import Ints, Upload

_LENGTH = 2
"""The field of an entry that says how long the row is; see `ENTRY_FIELDS`."""


class BatchBuilder:
    """Turns sub-batches of step plans into batches.

    Args:
        device: Where batches go.
        device_pool: Accounting of the device's blocks.
        host_pool: Accounting of the host's blocks; None if there are none.
        rotation: Where rotating rows' things are; None if there are no such rows.
    """

    def __init__(
        self,
        device: torch.device,
        device_pool: BlockPool,
        host_pool: BlockPool | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        self._device = device
        self._device_pool = device_pool
        self._host_pool = host_pool
        self._rotation = rotation
        self._device_tables = TableRows(device_pool)
        self._host_tables = None if host_pool is None else TableRows(host_pool)
        # Of each slot of the rotation: a row's table and length stay as they are while it rotates.
        num_slots = 0 if rotation is None else rotation.residuals.shape[0]
        self._rotating_tables = np.zeros((num_slots, 1), dtype=np.int32)
        self._rotating_lens = np.zeros(num_slots, dtype=np.int32)

    def build(self, sub_batch: SubBatch, source: Callable[[Request], int] | None = None) -> Batch:
        """Return a sub-batch's tensors on the device.

        Args:
            sub_batch: What to compute.
            source: Says where a request's pending token is; needed if there are such tokens.
        """
        resident, places = sub_batch.resident, self._places(sub_batch)
        items = resident + (places.entering if places is not None else [])
        upload = Upload(self._device)
        input_ids, sources = input_ids_of(items), sources_of(items, source)
        first = upload.add(input_ids)
        upload.add(positions_of(items))
        device_items = sub_batch.gdec + sub_batch.gprf
        upload.add(_logits_rows(resident, places))
        tables = [self.device_table(item) for item in device_items]
        device_rows = _RowsUpload(
            upload, sub_batch.gdec, sub_batch.gprf, tables, self._device_pool.block_size
        )
        staged = _StagedUpload(upload, sub_batch.cprf, self.host_tables(sub_batch.cprf), self)
        rotating = _RotatingUpload(upload, places, self)
        fed = None if sources is None else upload.add(sources)
        sent = upload.send()
        return Batch(
            input_ids=sent[first],
            positions=sent[first + 1],
            logits_rows=sent[first + 2],
            device_rows=device_rows.take(sent),
            host_prefills=staged.take(sent) if sub_batch.cprf else None,
            host_decodes=self.host_decodes(sub_batch.cdec),
            rotating=None if places is None else rotating.take(sent, self.rotating_lanes(places)),
            sources=None if fed is None else sent[fed],
            scored=_scored_rows(resident),
        )

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._device_pool.block_size

    @property
    def uses_staging(self) -> bool:
        """Whether chunks that go to the host are attended to in staging blocks."""
        return self._device.type == "cuda"

    def device_table(self, item: ScheduledRequest) -> Ints:
        """Return the blocks in the device pool of a share; not to be kept or written."""
        return self._table(self._device_tables, item)

    def _table(self, rows: TableRows, item: ScheduledRequest) -> Ints:
        return rows.row(item.request.request_id, self._device_pool.blocks_for(item.end))

    def host_tables(self, items: Sequence[ScheduledRequest]) -> list[Ints]:
        """Return the blocks in the host pool of each share; not to be kept or written."""
        if not items:
            return []
        assert self._host_tables is not None, "host-resident requests need a host pool"
        return [self._table(self._host_tables, item) for item in items]

    def host_decodes(self, items: Sequence[ScheduledRequest]) -> HostDecodeRows | None:
        """Return what the CPU attends to for host-resident decodes; None if there are none."""
        return _host_decode_rows(items, self.host_tables(items)) if items else None

    def _places(self, sub_batch: SubBatch) -> RotationPlaces | None:
        if not sub_batch.rotating:
            return None
        assert self._rotation is not None, "rotating rows need a rotation"
        places = self._rotation.advance(sub_batch.rotating)
        self.note_entering(places)
        return places

    def note_entering(self, places: RotationPlaces) -> None:
        """Note the tables and lengths of rows that enter, before anything else is asked of them."""
        for row, slot in zip(places.rows[: places.bounds[1]], places.slots, strict=False):
            if row is not None:
                self._note_entering(row.share, slot)

    def rotating_lanes(self, places: RotationPlaces) -> list[HostDecodeRows | None]:
        """Return what the CPU attends to, segment by segment; blocks count through the layers."""
        assert self._host_pool is not None, "rotating rows need a host pool"
        slots = np.asarray(places.slots, dtype=np.int64)
        layers = np.repeat(np.arange(len(places.bounds) - 1), np.diff(places.bounds))
        lanes: list[HostDecodeRows | None] = []
        for segment in places.segments:
            part = slice(places.bounds[segment.start], places.bounds[segment.stop])
            lens = self._rotating_lens[slots[part]]
            if not lens.any():
                lanes.append(None)
                continue
            width = self._host_pool.blocks_for(int(lens.max()))
            tables = self._rotating_tables[slots[part], :width]
            tables += (layers[part, None] * self._host_pool.num_blocks).astype(np.int32)
            if places.direct:
                _keep_newest_block(tables, lens, places.is_direct[part], self.block_size)
            lanes.append(
                HostDecodeRows(
                    block_tables=torch.from_numpy(tables), seq_lens=torch.from_numpy(lens)
                )
            )
        return lanes

    def fill_direct(self, places: RotationPlaces, entries: Ints, blocks: Ints) -> None:
        """Fill in what the device attends to itself; see `DirectRows`.

        Args:
            places: The step's.
            entries: `[num_segments, ENTRY_FIELDS, n]`.
            blocks: `[num_segments, num_blocks]`.
        """
        assert self._host_pool is not None, "rotating rows need a host pool"
        entries[:, _LENGTH] = 0
        for number, rows in enumerate(places.direct):
            end = 0
            for index, row in enumerate(rows):
                length = int(self._rotating_lens[row.slot])
                start, end = end, end + num_blocks_of(length, self.block_size)
                entries[number, :, index] = row.sent, row.answer, length, start
                table = self._rotating_tables[row.slot, : end - start]
                blocks[number, start:end] = table + row.layer * self._host_pool.num_blocks

    def num_direct_blocks(self, places: RotationPlaces) -> int:
        """Return the most blocks that the device attends to of a segment."""
        lens, size = self._rotating_lens, self.block_size
        counts = (
            sum(num_blocks_of(int(lens[row.slot]), size) for row in rows) for rows in places.direct
        )
        return max(counts, default=0)

    def _note_entering(self, item: ScheduledRequest, slot: int) -> None:
        [table] = self.host_tables([item])
        most = self._rotating_tables.shape[1]
        if len(table) > most:
            wider = np.zeros((len(self._rotating_lens), 2 * len(table)), dtype=np.int32)
            wider[:, :most] = self._rotating_tables
            self._rotating_tables = wider
        self._rotating_tables[slot, : len(table)] = table
        self._rotating_lens[slot] = item.end


class _RowsUpload:
    """The arrays of `PagedRows` on their way."""

    def __init__(
        self,
        upload: Upload,
        decodes: Sequence[ScheduledRequest],
        prefills: Sequence[ScheduledRequest],
        tables: Sequence[Ints],
        block_size: int,
    ) -> None:
        items = [*decodes, *prefills]
        self._num_decodes = len(decodes)
        self._max_decode_len = max((item.end for item in decodes), default=0)
        slots = [
            slots_of(item, table, block_size) for item, table in zip(items, tables, strict=True)
        ]
        self._first = upload.add(np.concatenate([*slots, np.empty(0, dtype=np.int64)]))
        starts = np.cumsum([len(decodes), *(item.num_tokens for item in prefills)])
        upload.add(starts.astype(np.int32))
        upload.add(np.asarray([item.end for item in items], dtype=np.int32))
        upload.add(_pad(tables))

    def take(self, sent: list[torch.Tensor]) -> PagedRows:
        slots, starts, seq_lens, tables = sent[self._first : self._first + 4]
        return PagedRows(
            num_decodes=self._num_decodes,
            slot_mapping=slots,
            prefill_cu_seqlens_q=starts,
            seq_lens=seq_lens,
            block_tables=tables,
            max_decode_len=self._max_decode_len,
        )


class _StagedUpload:
    """The arrays of `HostPrefillRows` on their way."""

    def __init__(
        self,
        upload: Upload,
        items: Sequence[ScheduledRequest],
        host_tables: Sequence[Ints],
        builder: BatchBuilder,
    ) -> None:
        if not items:
            return
        self._staging = builder.uses_staging
        size = builder.block_size
        staged = staged_blocks_of(items, host_tables, size)
        self._num_blocks = staged.num_blocks
        tables = staged.tables if self._staging else host_tables
        self._rows = _RowsUpload(upload, [], items, tables, size)
        self._first = upload.add(staged.prefix[0])
        for ids in (staged.prefix[1], *staged.written):
            upload.add(ids)

    def take(self, sent: list[torch.Tensor]) -> HostPrefillRows:
        rows = self._rows.take(sent)
        if not self._staging:
            return HostPrefillRows(rows=rows)
        ids = sent[self._first : self._first + 4]
        prefix = StagedCopy(staging_ids=ids[0], host_ids=ids[1])
        return HostPrefillRows(
            rows=rows,
            num_staging_blocks=self._num_blocks,
            prefix=prefix if ids[0].numel() else None,
            written=StagedCopy(staging_ids=ids[2], host_ids=ids[3]),
        )


class _RotatingUpload:
    """The arrays of `RotatingRows` on their way."""

    def __init__(
        self, upload: Upload, places: RotationPlaces | None, builder: BatchBuilder
    ) -> None:
        self._places = places
        if places is None:
            return
        self._first = upload.add(rotating_positions_of(places))
        upload.add(np.asarray(places.slots, dtype=np.int64))
        upload.add(np.asarray(places.answers, dtype=np.int64))
        if places.num_direct:
            num_segments, num_blocks = len(places.segments), builder.num_direct_blocks(places)
            entries = np.zeros((num_segments, ENTRY_FIELDS, places.num_direct), dtype=np.int32)
            blocks = np.zeros((num_segments, num_blocks), dtype=np.int32)
            builder.fill_direct(places, entries, blocks)
            upload.add(entries)
            upload.add(blocks)

    def take(
        self, sent: list[torch.Tensor], lanes: Sequence[HostDecodeRows | None]
    ) -> RotatingRows:
        places = self._places
        assert places is not None, "taken where there are rotating rows"
        positions, slots, answers = sent[self._first : self._first + 3]
        direct = None
        if places.num_direct:
            entries, blocks = sent[self._first + 3 : self._first + 5]
            direct = DirectRows(entries=entries, blocks=blocks)
        return RotatingRows(
            bounds=places.bounds,
            segments=places.segments,
            lanes=lanes,
            positions=positions,
            slots=slots,
            residuals=places.residuals,
            answers=answers,
            direct=direct,
        )


def _logits_rows(resident: Sequence[ScheduledRequest], places: RotationPlaces | None) -> Ints:
    """Return the rows that sample; rotating ones that do are behind all resident ones."""
    ends = np.cumsum([item.num_tokens for item in resident], dtype=np.int64)
    rows: Ints = ends[np.asarray([item.samples for item in resident], dtype=bool)] - 1
    if places is None:
        return rows
    end = int(ends[-1]) if resident else 0
    return np.concatenate([rows, end + np.arange(places.num_sampling)])


def _host_decode_rows(items: Sequence[ScheduledRequest], tables: Sequence[Ints]) -> HostDecodeRows:
    return HostDecodeRows(
        block_tables=torch.from_numpy(_pad(tables)),
        seq_lens=torch.tensor([item.end for item in items], dtype=torch.int32),
    )


def _keep_newest_block(
    tables: Ints, lens: Ints, is_direct: Sequence[bool], block_size: int
) -> None:
    """Leave of some rows what the new token's K and V are stored in, which is all the CPU does."""
    rows = np.flatnonzero(is_direct)
    newest = (lens[rows] - 1) // block_size
    tables[rows, 0] = tables[rows, newest]
    lens[rows] -= newest * block_size


def _scored_rows(items: Sequence[ScheduledRequest]) -> list[ScoredRows]:
    scored, row = [], 0
    for item in items:
        first, num_scored = item.start + 1, item.num_scored
        params = item.request.params
        if num_scored and params.prompt_logprobs is not None:
            scored.append(
                ScoredRows(
                    request_id=item.request.request_id,
                    first_row=row,
                    start=first,
                    token_ids=item.request.token_ids(first, first + num_scored),
                    num_top=params.prompt_logprobs,
                )
            )
        row += item.num_tokens
    return scored


def _pad(tables: Sequence[Ints]) -> Ints:
    """Return tables of different lengths as one array, `[len(tables), longest]`, int32."""
    width = max(map(len, tables), default=0)
    padded = np.zeros((len(tables), width), dtype=np.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    return padded
