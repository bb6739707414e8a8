"""A GPU's way to the CPU and back, played by the CPU, and ways that are broken."""

import time

import pytest

from engine.backends.channels import PinnedBuffers
from engine.backends.doorbells import HostDoorbells
from engine.backends.handover import DeviceHandover
from engine.backends.host_attention import HostAttention


class PlayedHandover(DeviceHandover):
    """`DeviceHandover` on CPU tensors: does at once what its kernels do in the stream."""

    def send(self, channel: int, offset: int, rows) -> None:
        ticket, count, slot = self._parameters[channel].tolist()
        if count:
            self._buffers.rows[slot, :count] = rows[:count]
            self._buffers.bells[slot, 0, 0] = ticket + offset

    def receive(self, channel: int, offset: int, out) -> None:
        ticket, count, slot = self._parameters[channel].tolist()
        while count and self._buffers.bells[slot, 1, 0].item() - ticket - offset < 0:
            time.sleep(1e-5)
        out[:count] = self._buffers.out[slot, :count]


def use_channels(patch: pytest.MonkeyPatch) -> None:
    """Let a CPU that plays the device hand rows over as a GPU does."""
    make = HostAttention.__init__

    def make_with_channels(self, kernels, shape, size, device, make_channels=None) -> None:
        def played(buffers: PinnedBuffers, count: int, limit_s: float) -> DeviceHandover:
            return PlayedHandover(buffers, count, device, limit_s)

        make(self, kernels, shape, size, device, played)

    patch.setattr(HostAttention, "__init__", make_with_channels)


def ring_nobody(patch: pytest.MonkeyPatch) -> None:
    """Let no service hear of any rows, whichever device rings, also from within a graph."""
    begin_step = DeviceHandover.begin_step

    def begin_without_rows(self, orders) -> None:
        begin_step(self, {})

    patch.setattr(DeviceHandover, "begin_step", begin_without_rows)
    patch.setattr(HostDoorbells, "ring", lambda *args: None)
