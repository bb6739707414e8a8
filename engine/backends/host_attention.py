"""Attention on the CPU for host-resident decodes: the host pool, its service and the rows between.

The device copies rotated Q, K and V rows to `rows`, rings, and later waits and copies `out` back.
Both buffers and the bells are pinned when the device is a GPU, which then does all that by kernels.
"""

from collections import deque
from collections.abc import Sequence

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.checks import host_kv_shapes
from engine.backends.base import AttentionShape, HostPoolSize, HostStepTimes
from engine.backends.channels import Channels, MakeChannels, PinnedBuffers
from engine.backends.rotating_attention import AttendDirectly, RotatingAttention
from engine.backends.turns import Turn, make_turns
from engine.batch import Batch, HostWork
from engine.errors import CapacityError, StepError
from engine.host_memory import allocate_host_tensor, pin, unpin
from engine.rotation import segment_rows

NUM_LANES = 2
DEFAULT_TIMEOUT_S = 30.0
"""Rows or answers that take longer than this are overdue; a layer takes milliseconds on a GPU."""
GPU_GRACE_S = 10.0
"""How much longer the GPU would wait if the service did not let it go."""
_NUM_TURNS = 2
"""One that is served, one ahead."""


class HostAttention:
    """The host's side of a device.

    Args:
        kernels: The attention threads.
        shape: The heads.
        size: Of the host pool.
        device: Whose rows are attended to.
        attend_directly: How the device attends to rotating rows itself.
        make_channels: Makes the way there and back; None if the device is the CPU.

    Raises:
        CapacityError: Host memory does not suffice or cannot be pinned.
    """

    def __init__(
        self,
        kernels: CpuAttention,
        shape: AttentionShape,
        size: HostPoolSize,
        device: torch.device,
        attend_directly: AttendDirectly,
        make_channels: MakeChannels | None = None,
    ) -> None:
        self._attend_directly = attend_directly
        self._make_channels = make_channels
        self._shape = shape
        self._kernels = kernels
        self._max_rows = size.max_rows
        self._rotating: RotatingAttention | None = None
        self._pinned: list[torch.Tensor] = []
        self._device = device
        self._on_gpu = device.type == "cuda"
        k_shape, v_shape = host_kv_shapes(
            size.num_blocks, shape.num_kv_heads, shape.head_dim, shape.block_size
        )
        self.k_pool = self._allocate((shape.num_layers, *k_shape), shape.dtype, kernels)
        self.v_pool = self._allocate((shape.num_layers, *v_shape), shape.dtype, kernels)
        q_width = shape.num_q_heads * shape.head_dim
        width = q_width + 2 * shape.num_kv_heads * shape.head_dim
        num_slots = _NUM_TURNS * NUM_LANES
        rows = self._allocate((num_slots, size.max_rows, width), shape.dtype, kernels)
        out = self._allocate((num_slots, size.max_rows, q_width), shape.dtype, kernels)
        bells = self._allocate((num_slots, 2, 16), torch.int32, kernels)
        self._turns = make_turns(
            kernels,
            shape,
            num_lanes=NUM_LANES,
            num_layers=shape.num_layers,
            rows=rows,
            out=out,
            bells=bells,
            timeout_s=DEFAULT_TIMEOUT_S,
        )
        self._channels = self._channels_over(rows, out, bells, NUM_LANES)
        self._num_steps = 0
        self._open: deque[Turn] = deque()
        self._now = self._turns[0]

    def _allocate(
        self, shape: tuple[int, ...], dtype: torch.dtype, kernels: CpuAttention
    ) -> torch.Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        try:
            tensor = allocate_host_tensor(shape, dtype)
            if self._on_gpu:
                kernels.touch(tensor)
                pin(tensor)
                self._pinned.append(tensor)
        except (OSError, RuntimeError) as error:
            self.close_memory()
            raise CapacityError(
                f"cannot take {num_bytes / 2**30:.1f} GiB of host memory for KV: {error}; lower "
                "--host-kv-gb, or raise the limit on locked memory (ulimit -l)"
            ) from error
        return tensor

    def _channels_over(
        self, rows: torch.Tensor, out: torch.Tensor, bells: torch.Tensor, count: int
    ) -> Channels | None:
        if self._make_channels is None:
            return None
        buffers = PinnedBuffers(
            rows=rows,
            out=out,
            bells=bells,
            allocate=lambda shape, dtype: self._allocate(shape, dtype, self._kernels),
        )
        return self._make_channels(buffers, count, DEFAULT_TIMEOUT_S + GPU_GRACE_S)

    @property
    def rotating(self) -> RotatingAttention:
        """Attention for rotating rows, once a step has had some."""
        assert self._rotating is not None, "no step has had rotating rows"
        return self._rotating

    @property
    def num_rotations(self) -> int:
        """Steps with rotating rows so far."""
        return self._rotating.num_steps if self._rotating is not None else 0

    def announce(self, batches: Sequence[Batch]) -> None:
        """Say which rotating rows the calls that follow are about."""
        for batch in batches:
            if batch.rotating is not None:
                self._made_rotating(len(batch.rotating.segments)).announce(batch.rotating)

    def begin_step(self, work: HostWork) -> None:
        """Give the services what to attend to; lanes without any rows take no part."""
        if work.rotating is not None:
            self._made_rotating(len(work.rotating)).begin_step(work.rotating)
        lanes = [(lane, rows) for lane, rows in enumerate(work.decodes) if rows is not None]
        if not lanes:
            return
        turn = self._now = self._turns[self._num_steps % _NUM_TURNS]
        self._num_steps += 1
        turn.begin_step(self.k_pool, self.v_pool, lanes, self._shape.softmax_scale)
        self._open.append(turn)
        if self._channels is not None:
            self._channels.begin_step(turn.orders)

    def reserve_rotation(self, num_segments: int) -> None:
        """Make what rotating rows are handed over with, in so many segments a step."""
        self._made_rotating(num_segments)

    def _made_rotating(self, num_segments: int) -> RotatingAttention:
        if self._rotating is None:
            self._rotating = RotatingAttention(
                self._kernels,
                self._shape,
                num_segments=num_segments,
                max_rows=segment_rows(self._shape.num_layers, self._max_rows),
                pools=(self.k_pool, self.v_pool),
                device=self._device,
                allocate=self._allocate,
                channels_over=self._channels_over,
                attend_directly=self._attend_directly,
                timeout_s=DEFAULT_TIMEOUT_S,
            )
        return self._rotating

    def send(self, lane: int, layer: int, qkv: torch.Tensor) -> None:
        """Hand over rotated rows, `[S, (num_q_heads + 2 * num_kv_heads) * head_dim]`.

        There may be more of them than the service was given; it takes the first ones.
        """
        if self._channels is not None:
            self._channels.send(lane, layer, qkv)
            return
        self._now.rows_of(lane)[: qkv.shape[0]].copy_(qkv)
        self._now.ring(lane, layer)

    def receive(self, lane: int, layer: int, out: torch.Tensor) -> None:
        """Wait for a layer's answer and copy it to `out`, `[S, num_q_heads * head_dim]`.

        Raises:
            StepError: The device is the CPU and the service has failed.
        """
        if self._channels is not None:
            self._channels.receive(lane, layer, out)
            return
        out.copy_(self._now.wait(lane, layer)[: out.shape[0]])

    def _take_waiting_s(self, turn: Turn) -> float:
        bells = turn.bells if self._channels is None else self._channels
        return bells.take_waiting_s()

    def end_step(self) -> HostStepTimes | None:
        """Wait until the service has left the oldest open step; see `Backend`."""
        if not self._open:
            return None
        turn = self._open.popleft()
        try:
            report = turn.end_step()
        except StepError:
            if self._on_gpu:
                torch.cuda.synchronize(self._device)
            self._take_waiting_s(turn)
            raise
        return HostStepTimes(
            attention_s=tuple(report.attention_s),
            waiting_s=report.waiting_s,
            handover_s=report.handover_s,
            device_waiting_s=self._take_waiting_s(turn),
        )

    def abandon_step(self, reason: str) -> None:
        """Give up the steps in progress, if there are any, and release everything that waits.

        Once nothing waits on the device, `end_step` and `end_rotations` leave them.
        """
        for turn in self._open:
            turn.service.abort_step(reason)
        if self._rotating is not None:
            self._rotating.abandon(reason)

    def join_direct(self) -> None:
        """Let later work of the device wait for its own attention to rotating rows."""
        if self._rotating is not None:
            self._rotating.join()

    def end_rotations(self, before: int) -> HostStepTimes | None:
        """Wait until the CPU has left earlier rotations; see `Backend`."""
        if self._on_gpu and before > self.num_rotations:
            torch.cuda.synchronize(self._device)  # a step may be on its way that waits for them
        return self._rotating.end_steps(before) if self._rotating is not None else None

    def forget_rotations(self) -> None:
        """Leave rotations that were given up."""
        if self._rotating is not None:
            self._rotating.forget()

    def close(self) -> None:
        """Stop the services and give back the memory."""
        if self._rotating is not None:
            self._rotating.close()
        for turn in self._turns:
            turn.service.close()
        self.close_memory()

    def close_memory(self) -> None:
        """Unpin what was pinned."""
        while self._pinned:
            unpin(self._pinned.pop())
