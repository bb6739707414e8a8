"""Who owns which KV block: strict accounting for one pool, without touching any memory.

Plain Python, so that the scheduler, its tests and the simulator can use it as it is.
"""

from collections.abc import Sequence

from engine.errors import CapacityError


class BlockPool:
    """The blocks of one pool; each block is free or belongs to exactly one owner.

    Args:
        num_blocks: Blocks in the pool.
        block_size: Tokens a block holds.

    Raises:
        CapacityError: There is not a single block.
        ValueError: `block_size` is not positive.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be positive, got {block_size}")
        if num_blocks < 1:
            raise CapacityError(
                f"the KV cache has room for {num_blocks} blocks of {block_size} tokens, 1 is "
                "needed; raise --host-kv-gb or --device-kv-blocks"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: blocks freed last are taken first, while they are still in a cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[str, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that have an owner."""
        return self.num_blocks - len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """Tokens the whole pool can hold."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_missing(self, owner: str, num_tokens: int) -> int:
        """Return how many more blocks `owner` needs to hold `num_tokens` tokens."""
        held = len(self._tables.get(owner, ()))
        return max(0, self.blocks_for(num_tokens) - held)

    def can_hold(self, owner: str, num_tokens: int) -> bool:
        """Return whether `grow(owner, num_tokens)` would succeed."""
        return self.num_missing(owner, num_tokens) <= len(self._free)

    def grow(self, owner: str, num_tokens: int) -> None:
        """Give `owner` blocks until it can hold `num_tokens` tokens.

        Raises:
            CapacityError: Too few blocks are free; nothing has changed then.
        """
        missing = self.num_missing(owner, num_tokens)
        if missing > len(self._free):
            raise CapacityError(
                f"{owner} needs {missing} more KV blocks, only {len(self._free)} of "
                f"{self.num_blocks} are free"
            )
        table = self._tables.setdefault(owner, [])
        for _ in range(missing):
            table.append(self._free.pop())

    def block_table(self, owner: str) -> Sequence[int]:
        """Return the owner's block ids in token order, not to be kept; empty if unknown."""
        return self._tables.get(owner, ())

    def free(self, owner: str) -> int:
        """Take all blocks from `owner` and return how many it had; 0 for an unknown owner."""
        table = self._tables.pop(owner, [])
        self._free.extend(reversed(table))
        return len(table)

    def owners(self) -> list[str]:
        """Return who owns at least one block."""
        return [owner for owner, table in self._tables.items() if table]

    def check_integrity(self) -> None:
        """Prove that every block is either free or owned exactly once.

        Raises:
            AssertionError: It is not so; this is a bug in NEO.
        """
        seen = list(self._free)
        for table in self._tables.values():
            seen.extend(table)
        if sorted(seen) != list(range(self.num_blocks)):
            raise AssertionError(
                f"block accounting broken: {len(seen)} entries for {self.num_blocks} blocks"
            )
