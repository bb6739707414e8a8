"""Block tables as arrays, kept from step to step: a request's table only grows while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.kv_blocks import BlockPool
from engine.upload import Ints

_LEAST_CAPACITY = 64
_MAX_ENTRIES = 1024


@dataclass(slots=True)
class _Entry:
    """An array and the list that it follows."""

    table: Sequence[int]
    array: Ints
    num_valid: int


class TableRows:
    """Copies a pool's tables piece by piece as they grow.

    Args:
        pool: Whose tables.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._entries: dict[str, _Entry] = {}

    def row(self, owner: str, num_blocks: int) -> Ints:
        """Return an owner's first blocks, `[num_blocks]`, int32; not to be kept or written."""
        table = self._pool.block_table(owner)
        entry = self._entries.get(owner)
        if entry is None or entry.table is not table:
            # A request that lost its blocks and got others has another list.
            self._drop_old()
            entry = _Entry(table, np.empty(_LEAST_CAPACITY, dtype=np.int32), 0)
            self._entries[owner] = entry
        if entry.num_valid < num_blocks:
            self._extend(entry, num_blocks)
        return entry.array[:num_blocks]

    def _extend(self, entry: _Entry, num_blocks: int) -> None:
        if num_blocks > entry.array.shape[0]:
            array = np.empty(2 * num_blocks, dtype=np.int32)
            array[: entry.num_valid] = entry.array[: entry.num_valid]
            entry.array = array
        entry.array[entry.num_valid : num_blocks] = entry.table[entry.num_valid : num_blocks]
        entry.num_valid = num_blocks

    def _drop_old(self) -> None:
        if len(self._entries) >= _MAX_ENTRIES:
            owners = set(self._pool.owners())
            self._entries = {o: e for o, e in self._entries.items() if o in owners}
