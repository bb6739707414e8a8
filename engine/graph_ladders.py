"""The numbers of rows, tokens and blocks that graphs are made for.

Steps that differ a little share a graph if it has room for a few rows more, so every number of a
shape is one of few.
"""

from collections.abc import Sequence

from engine.backends import Backend
from engine.graph_limits import MAX_GRAPH_TOKENS, MAX_STAGED_TOKENS, padded_tiles, whole_tiles
from engine.kv_blocks import BlockPool
from engine.lane_fields import PagedShape

_USUAL_PREFIX = 64
"""Blocks of prompts that come back from the host for their next chunk."""


class GraphLadders:
    """All numbers that the shapes of an engine's graphs may have, each list rising.

    Args:
        backend: Says how attention is split.
        pool: Accounting of the device's blocks.
        uses_staging: Prompts go to the host by way of staging blocks.
        max_num_seqs: Most requests of a step.
        max_num_tokens: Most tokens of a step.
        max_model_len: Most tokens of a request.
        most_visitors: Most rotating rows that every layer may have room for.
    """

    def __init__(
        self,
        backend: Backend,
        pool: BlockPool,
        *,
        uses_staging: bool,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        most_visitors: int,
    ) -> None:
        self._backend = backend
        self._pool = pool
        self.uses_staging = uses_staging
        self.decodes = row_ladder(max_num_seqs)
        """Rows of a step that only decodes on the device."""
        self.few_rows = _steps([8, 16, 24, 32, 48, 64, 96, 128, 192], max_num_seqs)
        """Decodes, on either side, of a step that also uses the host."""
        few = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
        self.visitors = _steps(few, most_visitors)
        """Rotating rows of a layer."""
        self.mixed_decodes = _steps([32, 64, 128], max_num_seqs)
        """Decodes beside prompts."""
        self.prefills = _steps([4, 16, 64], max_num_seqs)
        """Chunks of prompts."""
        self.tokens = token_ladder(min(max_num_tokens, MAX_GRAPH_TOKENS), max_num_seqs)
        """Rows of a step with prompts."""
        self.max_width = pool.blocks_for(max_model_len)
        """Blocks of the longest request."""
        self.num_staging_blocks = pool.blocks_for(MAX_STAGED_TOKENS)
        self.prefixes = _steps([_USUAL_PREFIX], self.num_staging_blocks)
        """Blocks that come back from the host."""

    def room(self, num_tokens: int, others: int) -> int:
        """Return the room for tokens of prompts that makes whole tiles of all rows."""
        rows = num_tokens + others
        total = next((step for step in self.tokens if step >= rows), padded_tiles(rows))
        return min(total - others, self.tokens[-1])

    def doubled_room(self, num_tokens: int, others: int) -> int:
        """Return room for more tokens of prompts, which makes a power of two of all rows."""
        alone = doubled(num_tokens, self.tokens[-1])
        return min(doubled(num_tokens + others) - others, alone)

    def num_written(self, host_prefills: PagedShape) -> int:
        """Return the staging blocks that chunks are copied from; one may end within a block."""
        if not (host_prefills.num_tokens and self.uses_staging):
            return 0
        most = self._pool.blocks_for(host_prefills.num_tokens) + 2 * host_prefills.num_prefills
        return min(most, self.num_staging_blocks)

    def most_splits(self, num_decodes: int) -> int:
        """Return room for the splits of decodes of any length."""
        longest = self.max_width * self._pool.block_size
        return doubled(self._backend.num_decode_splits(num_decodes, longest))


def row_ladder(most: int) -> list[int]:
    """Return the numbers of rows that graphs of decodes are made for."""
    return _steps([1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 64)], most)


def token_ladder(most: int, least_most: int) -> list[int]:
    """Return the numbers of tokens that graphs of mixed steps are made for.

    Args:
        most: The longest step.
        least_most: The ladder goes at least so far.
    """
    most = max(whole_tiles(most), least_most)
    return _steps([padded_tiles(rows) for rows in range(64, most + 1, 64)], most)


def at_least(ladder: Sequence[int], number: int) -> int:
    """Return the first of a ladder that is not less than a number."""
    return next(step for step in ladder if step >= number)


def doubled(number: int, most: int | None = None) -> int:
    """Return the next power of two, at most `most`; 0 for 0."""
    power = 1 << (number - 1).bit_length() if number else 0
    return power if most is None else min(most, power)


def _steps(steps: Sequence[int], most: int) -> list[int]:
    return sorted({min(step, most) for step in [*steps, most]})
