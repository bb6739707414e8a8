"""Many small integer arrays moved to the device with a single copy."""

from typing import Any

import numpy as np
import torch

Ints = np.ndarray[Any, np.dtype[Any]]
_ALIGNMENT = 8


class Upload:
    """Collects arrays, then moves them all at once.

    Args:
        device: Where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrays: list[Ints] = []

    def add(self, array: Ints) -> int:
        """Add an int32 or int64 array and return its index in the result of `send`."""
        self._arrays.append(np.ascontiguousarray(array))
        return len(self._arrays) - 1

    def send(self) -> list[torch.Tensor]:
        """Return the arrays as tensors on the device, in the order they were added."""
        offsets, end = [], 0
        for array in self._arrays:
            offsets.append(end)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        pinned = self._device.type == "cuda"
        host = torch.empty(max(end, _ALIGNMENT), dtype=torch.uint8, pin_memory=pinned)
        raw = host.numpy()
        for offset, array in zip(offsets, self._arrays, strict=True):
            raw[offset : offset + array.nbytes] = array.view(np.uint8).ravel()
        moved = host.to(self._device, non_blocking=True) if pinned else host
        return [
            moved[offset : offset + array.nbytes]
            .view(torch.int64 if array.dtype == np.int64 else torch.int32)
            .view(array.shape)
            for offset, array in zip(offsets, self._arrays, strict=True)
        ]
