"""The block pool keeps every block free or owned exactly once, whatever is done to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.errors import CapacityError
from engine.kv_blocks import BlockPool

OWNERS = st.sampled_from(["a", "b", "c", "d"])
NUM_BLOCKS, BLOCK_SIZE = 11, 16


class PoolMachine(RuleBasedStateMachine):
    """Compares the pool with a plain count of tokens per owner."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.tokens: dict[str, int] = {}

    def blocks_of(self, owner: str) -> int:
        return -(-self.tokens.get(owner, 0) // BLOCK_SIZE)

    @property
    def num_used(self) -> int:
        return sum(self.blocks_of(owner) for owner in self.tokens)

    @rule(owner=OWNERS, num_tokens=st.integers(0, NUM_BLOCKS * BLOCK_SIZE + 20))
    def grow(self, owner: str, num_tokens: int) -> None:
        wanted = max(self.tokens.get(owner, 0), num_tokens)
        missing = -(-wanted // BLOCK_SIZE) - self.blocks_of(owner)
        before = list(self.pool.block_table(owner))
        assert self.pool.num_missing(owner, num_tokens) == missing
        fits = missing <= NUM_BLOCKS - self.num_used
        assert self.pool.can_hold(owner, num_tokens) == fits
        if fits:
            self.pool.grow(owner, num_tokens)
            self.tokens[owner] = wanted
            assert list(self.pool.block_table(owner))[: len(before)] == before
        else:
            with pytest.raises(CapacityError, match="more KV blocks"):
                self.pool.grow(owner, num_tokens)
            assert list(self.pool.block_table(owner)) == before

    @rule(owner=OWNERS)
    def free(self, owner: str) -> None:
        assert self.pool.free(owner) == self.blocks_of(owner)
        self.tokens.pop(owner, None)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == self.num_used
        assert self.pool.num_free == NUM_BLOCKS - self.num_used
        assert set(self.pool.owners()) == {o for o in self.tokens if self.blocks_of(o)}
        for owner in self.tokens:
            assert len(self.pool.block_table(owner)) == self.blocks_of(owner)


TestPool = PoolMachine.TestCase


@given(num_tokens=st.integers(0, 10_000), block_size=st.sampled_from([1, 16, 32, 64]))
def test_blocks_for_is_the_ceiling(num_tokens: int, block_size: int) -> None:
    blocks = BlockPool(1, block_size).blocks_for(num_tokens)
    assert (blocks - 1) * block_size < num_tokens <= blocks * block_size


def test_unknown_owner_holds_nothing() -> None:
    pool = BlockPool(2, 16)
    assert pool.free("nobody") == 0
    assert list(pool.block_table("nobody")) == []
    assert pool.capacity_tokens == 32


def test_sizes_must_be_positive() -> None:
    with pytest.raises(CapacityError, match="room for 0 blocks of 16 tokens, 1 is needed"):
        BlockPool(0, 16)
    with pytest.raises(ValueError, match="block_size must be positive, got 0"):
        BlockPool(1, 0)


def test_integrity_check_finds_a_block_owned_twice_and_a_lost_one() -> None:
    pool = BlockPool(4, 16)
    pool.grow("a", 20)
    pool._tables["b"] = [pool.block_table("a")[0]]
    with pytest.raises(AssertionError, match="block accounting broken"):
        pool.check_integrity()
    pool._tables["b"] = []
    pool._tables["a"] = pool._tables["a"][:1]
    with pytest.raises(AssertionError, match="block accounting broken"):
        pool.check_integrity()
