"""Small tensors between host and device without waiting for the device."""

from collections.abc import Sequence

import torch


class HostCopy:
    """A device tensor on its way to the host.

    Args:
        tensor: On any device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        # A copy in any case: the caller may write the next step's values to the same place.
        self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._tensor.copy_(tensor, non_blocking=True)
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> torch.Tensor:
        """Wait until it has arrived and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor


class WrittenToHost:
    """Values that the device itself writes to memory of the host.

    Args:
        tensor: Where; work that the device was given so far writes to it.
        device: The device.
    """

    def __init__(self, tensor: torch.Tensor, device: torch.device) -> None:
        self._tensor = tensor
        self._written: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._written = torch.cuda.Event()
            self._written.record(torch.cuda.current_stream(device))

    def wait(self) -> torch.Tensor:
        """Wait until they are written and return them; later steps write to the same place."""
        if self._written is not None:
            self._written.synchronize()
        return self._tensor


def to_host(tensor: torch.Tensor) -> HostCopy:
    """Start copying a tensor to the host, behind the work that its device was given so far."""
    return HostCopy(tensor)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor on a device, copied behind the work it was given so far."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
