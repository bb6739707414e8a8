"""The numbers of a step's tokens, as arrays: which, at which positions, in which slots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from engine.request import Request
from engine.rotation import RotationPlaces
from engine.step_plan import ScheduledRequest
from engine.token_feedback import NO_SOURCE
from engine.upload import Ints


def input_ids_of(items: Sequence[ScheduledRequest]) -> Ints:
    """Return all tokens; pending ones are `PENDING_TOKEN`."""
    ids: list[int] = []
    for item in items:
        ids.extend(item.request.token_ids(item.start, item.end))
    return np.asarray(ids, dtype=np.int64)


def positions_of(items: Sequence[ScheduledRequest]) -> Ints:
    """Return each token's place in its request."""
    none = np.empty(0, dtype=np.int64)
    return np.concatenate([none, *(np.arange(item.start, item.end) for item in items)])


def sources_of(
    items: Sequence[ScheduledRequest], source: Callable[[Request], int] | None
) -> Ints | None:
    """Return where each token comes from; None if all are known."""
    ends = np.cumsum([item.num_tokens for item in items])
    # Only the last token of a request can be pending, and only one that decodes has one.
    pending = [
        (end - 1, item.request)
        for end, item in zip(ends, items, strict=True)
        if item.request.num_pending_tokens and item.samples
    ]
    if not pending:
        return None
    assert source is not None, "pending tokens need a source"
    sources = np.full(int(ends[-1]), NO_SOURCE, dtype=np.int64)
    for place, request in pending:
        sources[place] = source(request)
    return sources


def slots_of(item: ScheduledRequest, table: Ints, block_size: int) -> Ints:
    """Return where K and V of each token go: `block_id * block_size + offset`."""
    positions = np.arange(item.start, item.end)
    slots: Ints = table[positions // block_size].astype(np.int64) * block_size
    return slots + positions % block_size


def rotating_positions_of(places: RotationPlaces) -> Ints:
    """Return each rotating row's place in its request; 0 for rows to spare."""
    positions = [0 if row is None else row.share.start for row in places.rows]
    return np.asarray(positions, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedBlocks:
    """Where prompts that go to the host are attended to, and what is copied before and after.

    Args:
        tables: Of each chunk, the staging blocks.
        num_blocks: How many there are.
        prefix: Staging and host blocks of what was computed before, `[n]` each.
        written: Likewise, of what the step computes.
    """

    tables: list[Ints]
    num_blocks: int
    prefix: tuple[Ints, Ints]
    written: tuple[Ints, Ints]


def staged_blocks_of(
    items: Sequence[ScheduledRequest], host_tables: Sequence[Ints], block_size: int
) -> StagedBlocks:
    """Number staging blocks for chunks, given their blocks in the host pool."""
    ends = [0, *accumulate(map(len, host_tables))]
    tables = [np.arange(start, end, dtype=np.int32) for start, end in pairwise(ends)]
    chunks = list(zip(items, tables, host_tables, strict=True))
    prefix = [(-(-item.start // block_size), a, h) for item, a, h in chunks]
    first = [(item.start // block_size, a, h) for item, a, h in chunks]
    none = np.empty(0, dtype=np.int32)
    return StagedBlocks(
        tables=tables,
        num_blocks=ends[-1],
        prefix=(
            np.concatenate([none, *(a[:n] for n, a, _ in prefix)]),
            np.concatenate([none, *(h[:n] for n, _, h in prefix)]),
        ),
        written=(
            np.concatenate([none, *(a[n:] for n, a, _ in first)]),
            np.concatenate([none, *(h[n:] for n, _, h in first)]),
        ),
    )
