"""Swaps that run under the step's compute, on a stream of their own.

Requests that make room move layer by layer: whatever touches their blocks, on either side, does so
in the attention of some layer. So each layer waits for its own part of the copies and no longer,
and all but the first parts are hidden. A step that is a graph waits for all of them first.
Requests that come to the device sit a step out, so that nothing waits for them before the next one.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from engine.backends.host_attention import HostAttention
from engine.transfer import to_device
from gpu_kernels.kv_swap import swap_in_kv, swap_out_kv

_LAYERS_AT_ONCE = 4
"""One launch copies so many layers: fewer would be bound by launching, more would hide less."""
_PROGRAMS_BESIDE = 8
"""Of a copy to the device beside a step: 50 GB/s beside linear layers (H200)."""


class Swaps:
    """Moves blocks between the pools.

    Args:
        k_cache: The device pool, `[num_layers, num_blocks, ...]`.
        v_cache: Likewise.
        host: Whose pool is the other one.
    """

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor, host: HostAttention) -> None:
        self._k_cache = k_cache
        self._v_cache = v_cache
        self._host = host
        self._stream = torch.cuda.Stream(k_cache.device)
        self._groups = [
            slice(first, first + _LAYERS_AT_ONCE)
            for first in range(0, k_cache.shape[0], _LAYERS_AT_ONCE)
        ]
        self._copied = [torch.cuda.Event() for _ in self._groups]
        self._num_open = 0
        self._arrived = torch.cuda.Event()
        self._has_arrivals = False

    def start(
        self, device_blocks: Sequence[int], host_blocks: Sequence[int], *, to_host: bool
    ) -> None:
        """Start copying, behind all work that the device was given so far."""
        copy = swap_out_kv if to_host else swap_in_kv
        with self._behind_all():
            ids, host_ids = self._ids(device_blocks), self._ids(host_blocks)
            for group, copied in zip(self._groups, self._copied, strict=True):
                device = (self._k_cache[group], self._v_cache[group])
                host = (self._host.k_pool[group], self._host.v_pool[group])
                copy(*device, ids, *host, host_ids)
                copied.record(self._stream)
        self._num_open = len(self._groups)

    def start_arrivals(self, device_blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Start copying to the device beside a step, behind all work that it was given so far."""
        with self._behind_all():
            swap_in_kv(
                self._k_cache,
                self._v_cache,
                self._ids(device_blocks),
                self._host.k_pool,
                self._host.v_pool,
                self._ids(host_blocks),
                max_programs=_PROGRAMS_BESIDE,
            )
            self._arrived.record(self._stream)
        self._has_arrivals = True

    def join_arrivals(self) -> None:
        """Let later work of the current stream begin after such copies."""
        if self._has_arrivals:
            torch.cuda.current_stream(self._k_cache.device).wait_event(self._arrived)
            self._has_arrivals = False

    def _behind_all(self) -> AbstractContextManager[None]:
        """Return a context in which work is launched here, behind that of the current stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._k_cache.device))
        return torch.cuda.stream(self._stream)

    def _ids(self, blocks: Sequence[int]) -> torch.Tensor:
        return to_device(blocks, torch.int32, self._k_cache.device)

    def wait_for(self, layer: int) -> None:
        """Let later work of the current stream begin after a layer's copies."""
        group = layer // _LAYERS_AT_ONCE
        if group >= len(self._groups) - self._num_open:
            self._wait_until(group)

    def join(self) -> None:
        """Let later work of the current stream begin after all copies of `start`."""
        if self._num_open:
            self._wait_until(len(self._groups) - 1)

    def _wait_until(self, group: int) -> None:
        current = torch.cuda.current_stream(self._k_cache.device)
        current.wait_event(self._copied[group])
        self._num_open = len(self._groups) - 1 - group
