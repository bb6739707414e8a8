"""What only a GPU does, played by the CPU: channels, copies that take time, static buffers."""

import time
from collections.abc import Callable, Sequence

import pytest

from engine.backends.channels import PinnedBuffers
from engine.backends.cpu import CpuBackend
from engine.backends.doorbells import HostDoorbells
from engine.backends.handover import DeviceHandover
from engine.backends.host_attention import HostAttention
from engine.backends.side_stream import SideStream
from engine.cost_model import CostModel
from engine.runner import ModelRunner
from engine.step_graphs import StepGraphs


class PlayedHandover(DeviceHandover):
    """`DeviceHandover` on CPU tensors: does at once what its kernels do in the stream."""

    def send(self, channel: int, offset: int, rows, *, beside: bool = False) -> None:
        ticket, count, slot = self._parameters[channel].tolist()
        if count:
            self._buffers.rows[slot, :count] = rows[:count]
            self._buffers.bells[slot, 0, 0] = ticket + offset

    def receive(self, channel: int, offset: int, out, *, beside: bool = False) -> None:
        ticket, count, slot = self._parameters[channel].tolist()
        while count and self._buffers.bells[slot, 1, 0].item() - ticket - offset < 0:
            time.sleep(1e-5)
        out[:count] = self._buffers.out[slot, :count]


def use_channels(patch: pytest.MonkeyPatch) -> None:
    """Let a CPU that plays the device hand rows over as a GPU does."""
    make = HostAttention.__init__

    def make_with_channels(
        self, kernels, shape, size, device, attend_directly, make_channels=None
    ) -> None:
        def played(buffers: PinnedBuffers, count: int, limit_s: float) -> DeviceHandover:
            return PlayedHandover(buffers, count, device, limit_s)

        make(self, kernels, shape, size, device, attend_directly, played)

    patch.setattr(HostAttention, "__init__", make_with_channels)


def let_arrivals_come_late(patch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    """Let a CPU that plays the device copy what comes beside a step as late as a GPU may.

    Until then, NaN stands where it is to come.

    Returns:
        The blocks of each arrival so far; it grows.
    """
    swap_in, arrived = CpuBackend.swap_in, []
    on_their_way: list[tuple[Sequence[int], Sequence[int]]] = []

    def swap_in_late(self, device_blocks, host_blocks, *, beside: bool = False) -> None:
        if not beside:
            swap_in(self, device_blocks, host_blocks)
            return
        for cache in (self._k_cache, self._v_cache):
            cache[:, device_blocks] = float("nan")
        on_their_way.append((device_blocks, host_blocks))

    def join_arrivals(self) -> None:
        for device_blocks, host_blocks in on_their_way:
            swap_in(self, device_blocks, host_blocks)
            arrived.append(device_blocks)
        on_their_way.clear()

    patch.setattr(CpuBackend, "swap_in", swap_in_late)
    patch.setattr(CpuBackend, "join_arrivals", join_arrivals)
    return arrived


class LateSideStream(SideStream):
    """Runs work as late as whoever waits for it allows."""

    def __init__(self, device) -> None:
        super().__init__(device)
        self._work: list[Callable[[], None]] = []
        self._num_done = 0

    def run(self, work):
        self._work.append(work)
        return len(self._work)

    def wait(self, mark) -> None:
        for work in self._work[self._num_done : mark]:
            work()
        self._num_done = max(self._num_done, mark or 0)

    def forget(self) -> None:
        self._num_done = len(self._work)

    def join(self) -> None:
        self.wait(len(self._work))


def let_side_work_come_late(patch: pytest.MonkeyPatch) -> None:
    """Let the device's own attention to rotating rows be done as late as a GPU may do it."""
    patch.setattr("engine.backends.rotating_attention.SideStream", LateSideStream)


def let_device_attend(patch: pytest.MonkeyPatch, share: float = 0.5) -> None:
    """Let the device attend to a share of rotating rows, even if the CPU could hide them all."""

    def share_of(model: CostModel, *load: float) -> float:
        return share if model.most_direct_share else 0.0

    patch.setattr("engine.cost_model.prediction._direct_share", share_of)


def ring_nobody(patch: pytest.MonkeyPatch) -> None:
    """Let no service hear of any rows, whichever device rings, also from within a graph."""
    begin_step = DeviceHandover.begin_step

    def begin_without_rows(self, orders) -> None:
        begin_step(self, {})

    patch.setattr(DeviceHandover, "begin_step", begin_without_rows)
    patch.setattr(HostDoorbells, "ring", lambda *args: None)


def use_static_buffers(patch: pytest.MonkeyPatch) -> None:
    """Run steps from the buffers that graphs read."""

    def make_graphs(runner: ModelRunner, config, builder, pool, max_model_len: int) -> StepGraphs:
        return StepGraphs(
            runner._model,
            runner._backend,
            builder,
            pool,
            runner._feedback,
            runner._rotation,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=max_model_len,
        )

    patch.setattr(ModelRunner, "_make_graphs", make_graphs)
