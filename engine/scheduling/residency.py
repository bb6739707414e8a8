"""Where requests' KV blocks are: the two pools, and moves between them.

Accounting only; the runner moves the bytes. Who moves, and when, is the scheduler's choice.
"""

from collections.abc import Sequence

from engine.kv_blocks import BlockPool
from engine.request import Placement, Request
from engine.step_plan import Swap


class Residency:
    """The device pool and, if there is one, the host pool.

    Args:
        device: Blocks in device memory.
        host: Blocks in host memory, as large as the device's; None: requests stay on the device.

    Raises:
        ValueError: The pools' blocks differ in size.
    """

    def __init__(self, device: BlockPool, host: BlockPool | None) -> None:
        if host is not None and host.block_size != device.block_size:
            raise ValueError(
                f"device and host pool must have the same block_size, got {device.block_size} "
                f"and {host.block_size}"
            )
        self.device = device
        self.host = host
        self._left: list[str] = []
        """Requests on the device whose blocks on the host are being read."""

    def pool_of(self, request: Request) -> BlockPool:
        """Return the pool that holds a request's blocks, or will."""
        if request.placement is Placement.DEVICE:
            return self.device
        assert self.host is not None
        return self.host

    def needs_blocks(self, request: Request) -> bool:
        """Return whether a request's blocks do not hold all its tokens."""
        return self.pool_of(request).num_missing(request.request_id, request.num_tokens) > 0

    def can_grow(self, request: Request) -> bool:
        """Return whether the request's pool has room for all its tokens."""
        return self.pool_of(request).can_hold(request.request_id, request.num_tokens)

    def grow(self, request: Request) -> None:
        """Give a request blocks for all its tokens.

        Raises:
            CapacityError: Its pool lacks room.
        """
        self.pool_of(request).grow(request.request_id, request.num_tokens)

    def drop(self, request: Request) -> None:
        """Free all blocks of a request, on both sides; it may come back anywhere."""
        self.device.free(request.request_id)
        if self.host is not None:
            self.host.free(request.request_id)
        if request.request_id in self._left:
            self._left.remove(request.request_id)
        request.placement = Placement.DEVICE
        request.rotation_layer = None

    def host_can_take(self, request: Request) -> bool:
        """Return whether a device-resident request could be swapped out."""
        return self.host is not None and self.host.can_hold(request.request_id, request.num_tokens)

    def host_has_room(self, num_tokens: int) -> bool:
        """Return whether the host could take tokens of another request."""
        return self.host is not None and self.host.blocks_for(num_tokens) <= self.host.num_free

    def swap_out(self, request: Request, step: int) -> Swap:
        """Move a request to the host and make room for all its tokens there."""
        assert self.host is not None
        source, target = self._move(request, self.device, self.host, step)
        self.device.free(request.request_id)
        request.placement = Placement.HOST
        return Swap(request, device_blocks=source, host_blocks=target)

    def swap_in(self, request: Request, step: int) -> Swap:
        """Move a request to the device and make room for all its tokens there.

        Its blocks on the host are kept until `settle`: the step may read them while it computes.
        """
        assert self.host is not None
        source, target = self._move(request, self.host, self.device, step)
        self._left.append(request.request_id)
        request.placement = Placement.DEVICE
        return Swap(request, device_blocks=target, host_blocks=source)

    def settle(self) -> None:
        """Free the blocks that were swapped in since the last call; a new step waits for them."""
        for name in self._left:
            assert self.host is not None
            self.host.free(name)
        self._left.clear()

    def _move(
        self, request: Request, source: BlockPool, target: BlockPool, step: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        name = request.request_id
        num_blocks = source.blocks_for(request.num_computed_tokens)
        target.grow(name, request.num_tokens)
        blocks = _first(source.block_table(name), num_blocks)
        request.num_swaps += 1
        request.rotation_layer = None
        request.num_skipped_steps = 0
        request.last_swap_step = step
        return blocks, _first(target.block_table(name), num_blocks)


def _first(blocks: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    return tuple(blocks[:num_blocks])
