"""Attention on the CPU for host-resident decodes: the host pool, its service and the rows between.

The device copies rotated Q, K and V rows to `rows`, rings, and later waits and copies `out` back.
Both buffers and the bells are pinned when the device is a GPU.
"""

from collections.abc import Sequence

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.checks import host_kv_shapes
from cpu_kernels.errors import ServiceError
from cpu_kernels.service import AttentionService
from cpu_kernels.step import Lane
from engine.backends.base import AttentionShape, HostPoolSize, HostStepTimes
from engine.backends.doorbells import Doorbells, HostDoorbells, StreamDoorbells
from engine.batch import Batch
from engine.errors import CapacityError, StepError
from engine.host_memory import allocate_host_tensor, pin, unpin

NUM_LANES = 2
DEFAULT_TIMEOUT_S = 30.0
"""Rows or answers that take longer than this are overdue; a layer takes milliseconds on a GPU."""


class HostAttention:
    """The host's side of a device.

    Args:
        kernels: The attention threads.
        shape: The heads.
        size: Of the host pool.
        device: Whose rows are attended to.

    Raises:
        CapacityError: Host memory does not suffice or cannot be pinned.
    """

    def __init__(
        self,
        kernels: CpuAttention,
        shape: AttentionShape,
        size: HostPoolSize,
        device: torch.device,
    ) -> None:
        self._shape = shape
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
        self._rows = self._allocate((NUM_LANES, size.max_rows, width), shape.dtype, kernels)
        self._out = self._allocate((NUM_LANES, size.max_rows, q_width), shape.dtype, kernels)
        bells = self._allocate((NUM_LANES, 2, 16), torch.int32, kernels)
        self._service = AttentionService(
            kernels,
            num_layers=shape.num_layers,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rows=self._rows,
            out=self._out,
            bells=bells,
            timeout_s=DEFAULT_TIMEOUT_S,
        )
        self._bells: Doorbells = (
            StreamDoorbells(bells, device) if self._on_gpu else HostDoorbells(self._service)
        )
        self._lanes: dict[int, int] = {}
        self._tickets: list[int] = []

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

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Give the service the step's host-resident decodes; lanes without any take no part."""
        lanes = [
            (lane, batch.host_decodes)
            for lane, batch in enumerate(batches)
            if batch.host_decodes is not None
        ]
        self._lanes = {lane: at for at, (lane, _) in enumerate(lanes)}
        if not lanes:
            return
        self._service.begin_step(
            self.k_pool,
            self.v_pool,
            [Lane(block_tables=rows.block_tables, seq_lens=rows.seq_lens) for _, rows in lanes],
            self._shape.softmax_scale,
        )
        self._tickets = [self._service.first_ticket(at) for at in range(len(lanes))]

    def send(self, lane: int, layer: int, qkv: torch.Tensor) -> None:
        """Hand over rotated rows, `[S, (num_q_heads + 2 * num_kv_heads) * head_dim]`."""
        at = self._lanes[lane]
        self._rows[at, : qkv.shape[0]].copy_(qkv, non_blocking=True)
        self._bells.ring(at, self._tickets[at] + layer)

    def receive(self, lane: int, layer: int, out: torch.Tensor) -> None:
        """Wait for a layer's answer and copy it to `out`, `[S, num_q_heads * head_dim]`.

        Raises:
            StepError: The device is the CPU and the service has failed.
        """
        at = self._lanes[lane]
        try:
            self._bells.wait(at, self._tickets[at] + layer)
        except ServiceError as error:
            raise StepError(f"CPU attention failed: {error}") from error
        out.copy_(self._out[at, : out.shape[0]], non_blocking=True)

    def end_step(self) -> HostStepTimes | None:
        """Wait until the service has left the step; see `Backend`."""
        if not self._lanes:
            return None
        self._lanes = {}
        try:
            report = self._service.end_step()
        except ServiceError as error:
            if self._on_gpu:
                torch.cuda.synchronize(self._device)
            self._bells.take_waiting_s()
            raise StepError(f"CPU attention failed: {error}") from error
        return HostStepTimes(
            attention_s=tuple(report.attention_s),
            waiting_s=report.waiting_s,
            handover_s=report.handover_s,
            device_waiting_s=self._bells.take_waiting_s(),
        )

    def abandon_step(self, reason: str) -> None:
        """Give up the step in progress, if there is one, and release everything that waits."""
        if self._lanes:
            self._service.abort_step(reason)

    def close(self) -> None:
        """Stop the service and give back the memory."""
        self._service.close()
        self.close_memory()

    def close_memory(self) -> None:
        """Unpin what was pinned."""
        while self._pinned:
            unpin(self._pinned.pop())
