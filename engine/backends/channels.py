"""What a device that is not the CPU needs of a hand-over of rows; one per lane or segment."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Order:
    """What a channel does in a step.

    Args:
        ticket: Of layer 0.
        num_rows: Rows that are handed over.
        slot: Whose part of the pinned memory they use.
    """

    ticket: int
    num_rows: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedBuffers:
    """Memory that device and services share.

    Args:
        rows: `[num_slots, max_rows, row_width]`.
        out: `[num_slots, max_rows, q_width]`.
        bells: `[num_slots, 2, 16]`, int32.
        allocate: Makes more of it.
    """

    rows: torch.Tensor
    out: torch.Tensor
    bells: torch.Tensor
    allocate: Allocate


class Channels(Protocol):
    """Hands rows over and takes answers, without the host's help between two steps.

    What is done `beside` the step's other work is not to keep that from the multiprocessors.
    """

    def begin_step(self, orders: Mapping[int, Order]) -> None:
        """Tell the channels what the launches that follow do; those not named do nothing."""

    def send(self, channel: int, offset: int, rows: torch.Tensor, *, beside: bool = False) -> None:
        """Copy rows, `[n, row_width]`, to the host; ring `offset` behind the channel's ticket."""

    def receive(
        self, channel: int, offset: int, out: torch.Tensor, *, beside: bool = False
    ) -> None:
        """Wait for the answer `offset` behind the channel's ticket; fill `out`, `[n, q_width]`."""

    def take_waiting_s(self) -> float:
        """Return how long the device waited since the last call, as far as it has got."""


MakeChannels = Callable[[PinnedBuffers, int, float], Channels]
"""From buffers, the number of channels and the longest wait in seconds."""
