"""Rotating rows whose attention the device computes itself, reading the host pool over PCIe.

Their K and V stay on the host, like those of the others. The CPU is handed all rows, but of these
the newest block only: it stores the new token's K and V there, and its answer is for nobody.

The device has half a step for each segment's rows. Those of the first segments are attended to in
the same step, right behind their last layer; those of the others in the next overlap step, before
their first. So nothing is under way between two steps, and a captured graph has all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_DIRECT_BLOCKS = 2048
"""Of a segment. Llama-2-7B's take PCIe 5 ten milliseconds, twice a step of an H200."""

ENTRY_FIELDS = 4
"""Of an entry: the row among its segment's, the answer's place, the length, the first block."""


@dataclass(frozen=True, slots=True)
class DirectRow:
    """A row that the device attends to.

    Args:
        sent: Its place among the rows that its segment handed over.
        answer: Where its answer goes among the segment's.
        slot: Of the rotation, where its table and length are.
        layer: At which it was handed over.
    """

    sent: int
    answer: int
    slot: int
    layer: int


class DirectChoice:
    """Chooses rows so that their tokens come to a share of all, and lie spread over the layers.

    Args:
        block_size: Tokens of a block.
    """

    def __init__(self, block_size: int) -> None:
        self.share = 0.0
        """Of the tokens that rotating rows attend to."""
        self._block_size = block_size
        self._owed = 0.0
        self._room = 0

    def begin_segment(self) -> None:
        """Say that the rows that follow are the next segment's."""
        self._room = MAX_DIRECT_BLOCKS

    def takes(self, num_tokens: int) -> bool:
        """Return whether the device attends to a row.

        Args:
            num_tokens: That it attends to, the new one included.
        """
        self._owed += self.share * num_tokens
        blocks = num_blocks_of(num_tokens, self._block_size)
        if self._owed < num_tokens / 2 or blocks > self._room:
            # What did not fit once is not made up for later.
            self._owed = min(self._owed, float(num_tokens))
            return False
        self._owed -= num_tokens
        self._room -= blocks
        return True


def num_blocks_of(num_tokens: int, block_size: int) -> int:
    """Return the blocks of a row that attends to so many tokens."""
    return -(-num_tokens // block_size)


def deferred_segments(num_segments: int) -> range:
    """Return the segments whose rows the device attends to in the step after their hand-over."""
    return range(num_segments // 2, num_segments)


def num_entries(segments: Sequence[range], num_visitors: int) -> int:
    """Return the most rows of a segment that are attended to in a step.

    Args:
        segments: Their layers.
        num_visitors: Most rotating rows of a layer.
    """
    return num_visitors * max(map(len, segments))
