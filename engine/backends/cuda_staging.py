"""Prefill straight to the host: device blocks for one layer at a time.

A chunk's K and V of one layer are written to staging blocks, which look like a pool of one layer,
attended to there, and copied to the host pool on a side stream while the next layers compute. A
cached prefix is fetched into the same blocks on another one, a layer ahead. So layers take turns
with three buffers a lane: one that is filled, one attended to, one that is emptied.
"""

from dataclasses import dataclass

import torch

from engine.backends.base import AttentionShape
from engine.backends.host_attention import HostAttention
from engine.batch import HostPrefillRows, StagedCopy
from gpu_kernels.kv_swap import swap_in_kv, swap_out_kv

_NUM_BUFFERS = 3
_PROGRAMS_IN = 8
_PROGRAMS_OUT = 2
"""Of a copy beside a step with prompts, for 50 and 43 GB/s. Each keeps linear layers off a
multiprocessor, and these have work for all of them once or twice: see `gpu_kernels.linear`."""


@dataclass(slots=True)
class _Buffer:
    """One layer's worth of blocks, `[1, num_blocks, num_kv_heads, block_size, head_dim]` each."""

    k: torch.Tensor
    v: torch.Tensor
    fetched: torch.cuda.Event
    copied: torch.cuda.Event


class Staging:
    """Staging blocks and the streams that fill and empty them.

    Args:
        shape: The heads.
        host: Whose pool the blocks go to.
        device: The GPU.
    """

    def __init__(self, shape: AttentionShape, host: HostAttention, device: torch.device) -> None:
        self._shape = shape
        self._host = host
        self._device = device
        self._stream_in = torch.cuda.Stream(device)
        self._stream_out = torch.cuda.Stream(device)
        self._buffers: dict[tuple[int, int], _Buffer] = {}
        self._fixed: dict[tuple[int, int], _Buffer] = {}
        self._used: set[tuple[int, int]] = set()

    def reserve(self, lane: int, num_blocks: int) -> None:
        """Make buffers of a lane that stay where they are, for graphs and all that fits in them."""
        for number in range(_NUM_BUFFERS):
            if (lane, number) not in self._fixed:
                self._fixed[lane, number] = self._made(num_blocks)

    def begin_layer(
        self, lane: int, layer: int, prefills: HostPrefillRows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's K and V blocks, free to be written, a cached prefix in place.

        Args:
            lane: Which batch of the step.
            layer: Of the model.
            prefills: The chunks.

        Returns:
            K and V, `[num_blocks, num_kv_heads, block_size, head_dim]`.
        """
        buffer = self._buffer(lane, layer, prefills.num_staging_blocks)
        current = torch.cuda.current_stream(self._device)
        if prefills.prefix is None:
            self._wait_until_empty(current, lane, layer, buffer)
        else:
            if layer == 0:
                self._fetch(lane, layer, prefills)
            current.wait_event(buffer.fetched)
            if layer + 1 < self._shape.num_layers:
                self._fetch(lane, layer + 1, prefills)
        return buffer.k[0], buffer.v[0]

    def _fetch(self, lane: int, layer: int, prefills: HostPrefillRows) -> None:
        """Start to fetch a layer's prefix, behind the attention that its buffer was used for."""
        assert prefills.prefix is not None, "there is a prefix"
        buffer = self._buffer(lane, layer, prefills.num_staging_blocks)
        self._stream_in.wait_stream(torch.cuda.current_stream(self._device))
        self._wait_until_empty(self._stream_in, lane, layer, buffer)
        with torch.cuda.stream(self._stream_in):
            self._copy(buffer, layer, prefills.prefix, to_host=False)
            buffer.fetched.record(self._stream_in)

    def _wait_until_empty(
        self, stream: torch.cuda.Stream, lane: int, layer: int, buffer: _Buffer
    ) -> None:
        """Let later work of a stream begin when what a buffer held in this step is on the host."""
        if (lane, layer % _NUM_BUFFERS) in self._used:
            stream.wait_event(buffer.copied)

    def end_layer(self, lane: int, layer: int, prefills: HostPrefillRows) -> None:
        """Copy what was written to the host pool, behind the work that follows."""
        buffer = self._buffer(lane, layer, prefills.num_staging_blocks)
        assert prefills.written is not None, "chunks that go to the host leave staging"
        self._stream_out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream_out):
            self._copy(buffer, layer, prefills.written, to_host=True)
            buffer.copied.record(self._stream_out)
        self._used.add((lane, layer % _NUM_BUFFERS))

    def join(self) -> None:
        """Let later work of the current stream begin after all copies."""
        if self._used:  # else there is nothing to wait for, which a graph could not capture
            torch.cuda.current_stream(self._device).wait_stream(self._stream_out)
            self._used.clear()

    def forget(self) -> None:
        """Forget a step that was given up; the device must have left it."""
        self._used.clear()

    def _buffer(self, lane: int, layer: int, num_blocks: int) -> _Buffer:
        key = (lane, layer % _NUM_BUFFERS)
        fixed = self._fixed.get(key)
        if fixed is not None and fixed.k.shape[1] >= num_blocks:
            return fixed
        buffer = self._buffers.get(key)
        if buffer is None or buffer.k.shape[1] < num_blocks:
            if buffer is not None:
                buffer.copied.synchronize()
            buffer = self._buffers[key] = self._made(num_blocks)
        return buffer

    def _made(self, num_blocks: int) -> _Buffer:
        shape = self._shape
        size = (1, num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        k = torch.zeros(size, dtype=shape.dtype, device=self._device)
        return _Buffer(k, torch.zeros_like(k), torch.cuda.Event(), torch.cuda.Event())

    def _copy(self, buffer: _Buffer, layer: int, blocks: StagedCopy, *, to_host: bool) -> None:
        staged = (buffer.k, buffer.v, blocks.staging_ids)
        pools = (self._host.k_pool[layer : layer + 1], self._host.v_pool[layer : layer + 1])
        if to_host:
            swap_out_kv(*staged, *pools, blocks.host_ids, max_programs=_PROGRAMS_OUT)
        else:
            swap_in_kv(*staged, *pools, blocks.host_ids, max_programs=_PROGRAMS_IN)
