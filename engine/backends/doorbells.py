"""How the device tells the CPU that rows are ready, and waits for its answer.

A doorbell is a 32-bit word in memory that both sides see. Tickets count up; a wait is over once the
word has reached its ticket. Python takes no part between a ring and its answer: on a GPU both are
entries of the stream.
"""

import ctypes
import time
from typing import Any, Protocol

import torch

from cpu_kernels.service import AttentionService
from engine.errors import ConfigError

_WAIT_GEQ = 0x0
_WRITE_DEFAULT = 0x0


class Doorbells(Protocol):
    """One side's access to the bells of `AttentionService`."""

    def ring(self, lane: int, ticket: int) -> None:
        """Announce a lane's rows once all work before this is done."""

    def wait(self, lane: int, ticket: int) -> None:
        """Let no later work begin before the answer has come."""

    def take_waiting_s(self) -> float:
        """Return how long the device waited since the last call; all waits must be over."""


class HostDoorbells:
    """The device is the CPU: calls ring and wait at once.

    Args:
        service: Whose bells.
    """

    def __init__(self, service: AttentionService) -> None:
        self._service = service
        self._waiting_s = 0.0

    def ring(self, lane: int, ticket: int) -> None:
        """Ring now; see `Doorbells`."""
        self._service.ring(lane, ticket)

    def wait(self, lane: int, ticket: int) -> None:
        """Block the caller; see `Doorbells`."""
        start = time.perf_counter()
        self._service.wait(lane, ticket)
        self._waiting_s += time.perf_counter() - start

    def take_waiting_s(self) -> float:
        """Return how long `wait` blocked; see `Doorbells`."""
        waiting_s, self._waiting_s = self._waiting_s, 0.0
        return waiting_s


class StreamDoorbells:
    """The device is a GPU: memory operations of its current stream, by the CUDA driver API.

    Args:
        bells: `[num_lanes, 2, 16]`, int32, pinned; request word `[lane, 0, 0]`, answer word
            `[lane, 1, 0]`.
        device: The GPU.

    Raises:
        ConfigError: The driver lacks stream memory operations.
    """

    def __init__(self, bells: torch.Tensor, device: torch.device) -> None:
        self._device = device
        self._requests = [bells[lane, 0].data_ptr() for lane in range(bells.shape[0])]
        self._answers = [bells[lane, 1].data_ptr() for lane in range(bells.shape[0])]
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._num_waits = 0
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            self._write = _stream_operation(driver, "cuStreamWriteValue32_v2")
            self._wait = _stream_operation(driver, "cuStreamWaitValue32_v2")
        except (OSError, AttributeError) as error:
            raise ConfigError(
                "the CUDA driver lacks stream memory operations, which offloading needs; "
                "update the driver or use --mode gpu-only"
            ) from error

    def ring(self, lane: int, ticket: int) -> None:
        """Enqueue the ring; see `Doorbells`."""
        self._enqueue(self._write, self._requests[lane], ticket, _WRITE_DEFAULT)

    def wait(self, lane: int, ticket: int) -> None:
        """Enqueue the wait between two events; see `Doorbells`."""
        if self._num_waits == len(self._events):
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events.append(pair)
        before, after = self._events[self._num_waits]
        self._num_waits += 1
        stream = torch.cuda.current_stream(self._device)
        before.record(stream)
        self._enqueue(self._wait, self._answers[lane], ticket, _WAIT_GEQ)
        after.record(stream)

    def take_waiting_s(self) -> float:
        """Return how long the stream stood still; see `Doorbells`."""
        pairs = self._events[: self._num_waits]
        self._num_waits = 0
        milliseconds: float = sum(before.elapsed_time(after) for before, after in pairs)
        return milliseconds / 1000

    def _enqueue(self, operation: Any, address: int, ticket: int, flags: int) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        code = operation(stream, address, ticket & 0xFFFFFFFF, flags)
        if code != 0:
            raise RuntimeError(f"CUDA driver error {code} in a stream memory operation")


def _stream_operation(driver: ctypes.CDLL, name: str) -> Any:
    operation = getattr(driver, name)
    operation.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    operation.restype = ctypes.c_int
    return operation
