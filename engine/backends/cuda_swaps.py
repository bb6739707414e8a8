"""Swaps that run under the step's compute: layer by layer on a stream of their own.

Whatever touches a block that moves, on either side, does so in the attention of some layer. So each
layer waits for its own part of the copies and no longer, and all but the first parts are hidden.
"""

from collections.abc import Sequence

import torch

from engine.backends.host_attention import HostAttention
from engine.transfer import to_device
from gpu_kernels.kv_swap import swap_in_kv, swap_out_kv

_LAYERS_AT_ONCE = 4
"""One launch copies so many layers: fewer would be bound by launching, more would hide less."""


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

    def start(
        self, device_blocks: Sequence[int], host_blocks: Sequence[int], *, to_host: bool
    ) -> None:
        """Start copying, behind all work that the device was given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._k_cache.device))
        copy = swap_out_kv if to_host else swap_in_kv
        with torch.cuda.stream(self._stream):
            ids = to_device(device_blocks, torch.int32, self._k_cache.device)
            host_ids = to_device(host_blocks, torch.int32, self._k_cache.device)
            for group, copied in zip(self._groups, self._copied, strict=True):
                device = (self._k_cache[group], self._v_cache[group])
                host = (self._host.k_pool[group], self._host.v_pool[group])
                copy(*device, ids, *host, host_ids)
                copied.record(self._stream)
        self._num_open = len(self._groups)

    def wait_for(self, layer: int) -> None:
        """Let later work of the current stream begin after a layer's copies."""
        group = layer // _LAYERS_AT_ONCE
        if group >= len(self._groups) - self._num_open:
            self._wait_until(group)

    def join(self) -> None:
        """Let later work of the current stream begin after all copies."""
        if self._num_open:
            self._wait_until(len(self._groups) - 1)

    def _wait_until(self, group: int) -> None:
        current = torch.cuda.current_stream(self._k_cache.device)
        current.wait_event(self._copied[group])
        self._num_open = len(self._groups) - 1 - group
