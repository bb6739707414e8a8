"""Rows from a GPU to the CPU and answers back, by kernels of the GPU's stream.

Python takes no part between a ring and its answer, and nothing that changes from step to step is in
the launches, so they can be captured in a graph.
"""

from collections.abc import Mapping

import torch

from engine.backends.channels import Order, PinnedBuffers
from gpu_kernels.handover import (
    FEW_PROGRAMS,
    MAX_PROGRAMS,
    PARAMETERS,
    receive_rows,
    send_rows,
)

_NUM_UPLOADS = 4
"""Uploads that may be on their way at once; two steps are."""


class DeviceHandover:
    """`Channels` between a GPU and attention services; see `gpu_kernels.handover`.

    Args:
        buffers: Pinned.
        num_channels: How many there are.
        device: The GPU.
        limit_s: Longest wait of the GPU; the services give up earlier and let it go on.
    """

    def __init__(
        self, buffers: PinnedBuffers, num_channels: int, device: torch.device, limit_s: float
    ) -> None:
        self._buffers = buffers
        self._limit_s = limit_s
        size = (num_channels, PARAMETERS)
        self._uploads = [buffers.allocate(size, torch.int32) for _ in range(_NUM_UPLOADS)]
        self._filled = [upload.numpy() for upload in self._uploads]
        self._num_steps = 0
        self._parameters = torch.zeros(size, dtype=torch.int32, device=device)
        self._counters = torch.zeros(num_channels, 1, dtype=torch.int32, device=device)
        self._seen = torch.zeros(buffers.bells.shape[0], dtype=torch.int32, device=device)
        self._waited = buffers.allocate((1,), torch.int64)
        self._waited.zero_()
        self._taken_ns = 0

    def begin_step(self, orders: Mapping[int, Order]) -> None:
        """Tell the channels what to do; see `Channels`."""
        number = self._num_steps % _NUM_UPLOADS
        self._num_steps += 1
        parameters = self._filled[number]
        parameters[:] = 0
        for channel, order in orders.items():
            ticket = (order.ticket + 2**31) % 2**32 - 2**31  # its bits, as a signed word
            parameters[channel] = ticket, order.num_rows, order.slot
        self._parameters.copy_(self._uploads[number], non_blocking=True)

    def send(self, channel: int, offset: int, rows: torch.Tensor, *, beside: bool = False) -> None:
        """Hand rows over; see `Channels`."""
        send_rows(
            self._buffers.rows,
            rows,
            self._buffers.bells,
            self._parameters[channel],
            self._counters[channel],
            offset,
            max_programs=FEW_PROGRAMS if beside else MAX_PROGRAMS,
        )

    def receive(
        self, channel: int, offset: int, out: torch.Tensor, *, beside: bool = False
    ) -> None:
        """Take an answer; see `Channels`."""
        receive_rows(
            out,
            self._buffers.out,
            self._buffers.bells,
            self._parameters[channel],
            self._seen,
            self._waited,
            offset,
            limit_s=self._limit_s,
            max_programs=FEW_PROGRAMS if beside else MAX_PROGRAMS,
        )

    def take_waiting_s(self) -> float:
        """Return how long the GPU waited; see `Channels`."""
        waited_ns = int(self._waited.item())
        waiting_ns, self._taken_ns = waited_ns - self._taken_ns, waited_ns
        return waiting_ns / 1e9
