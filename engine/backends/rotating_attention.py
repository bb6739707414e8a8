"""Attention on the CPU for rotating rows: handed over in one overlap step, answered in the next.

Each turn has a service, rows and bells of its own, so that a step can begin while the CPU is still
busy with the one before it. All turns share the attention threads and the host pool, which is seen
as one layer whose blocks count through all of the model's.
"""

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.errors import ServiceError
from cpu_kernels.service import AttentionService
from cpu_kernels.step import Lane, StepReport
from engine.backends.base import AttentionShape, HostStepTimes
from engine.backends.doorbells import Doorbells, HostDoorbells, StreamDoorbells
from engine.batch import RotatingRows
from engine.errors import StepError

_NUM_TURNS = 3
"""One that is being computed by the device, one before it that the CPU answers, one ahead."""

_Allocate = Callable[[tuple[int, ...], torch.dtype, CpuAttention], torch.Tensor]


@dataclass(slots=True, eq=False)
class _Turn:
    """What one overlap step hands over; `out` is also where the next one finds its answers.

    `at` says which of the service's lanes a segment has in this step, and `tickets` its tickets.
    """

    service: AttentionService
    bells: Doorbells
    rows: torch.Tensor
    out: torch.Tensor
    step: int = 0
    at: dict[int, int] = field(default_factory=dict)
    tickets: dict[int, int] = field(default_factory=dict)


class RotatingAttention:
    """Hands rows over and takes answers; see `Backend` for the order of calls.

    Args:
        kernels: The attention threads.
        shape: The heads.
        num_segments: Hand-overs of a step.
        max_rows: Most rows of one of them.
        pools: K and V of the host pool.
        device: Whose rows are attended to.
        allocate: Makes memory that the device can reach.
        timeout_s: Rows or answers that take longer are overdue.
    """

    def __init__(
        self,
        kernels: CpuAttention,
        shape: AttentionShape,
        *,
        num_segments: int,
        max_rows: int,
        pools: tuple[torch.Tensor, torch.Tensor],
        device: torch.device,
        allocate: _Allocate,
        timeout_s: float,
    ) -> None:
        self._scale = shape.softmax_scale
        k_pool, v_pool = pools
        self._k_pool = k_pool.view(1, -1, *k_pool.shape[2:])
        self._v_pool = v_pool.view(1, -1, *v_pool.shape[2:])
        q_width = shape.num_q_heads * shape.head_dim
        width = q_width + 2 * shape.num_kv_heads * shape.head_dim
        self._turns: list[_Turn] = []
        for _ in range(_NUM_TURNS):
            rows = allocate((num_segments, max_rows, width), shape.dtype, kernels)
            out = allocate((num_segments, max_rows, q_width), shape.dtype, kernels)
            bells = allocate((num_segments, 2, 16), torch.int32, kernels)
            service = AttentionService(
                kernels,
                num_layers=1,
                num_q_heads=shape.num_q_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                rows=rows,
                out=out,
                bells=bells,
                timeout_s=timeout_s,
                # The next turn's service waits while this one's computes: it must leave the core.
                spin_us=0,
            )
            on_gpu = device.type == "cuda"
            made = StreamDoorbells(bells, device) if on_gpu else HostDoorbells(service)
            self._turns.append(_Turn(service, made, rows, out))
        # On a GPU, rows are collected and answers unpacked there: one copy a segment each way.
        self._sent = rows.to(device) if on_gpu else None
        self._received = out.to(device) if on_gpu else None
        self._open: deque[_Turn] = deque()
        self._num_steps = 0
        self._rows: RotatingRows | None = None
        self._now = self._before = self._turns[0]

    @property
    def num_steps(self) -> int:
        """Overlap steps begun."""
        return self._num_steps

    @property
    def rows(self) -> RotatingRows:
        """The rows of the step begun last."""
        assert self._rows is not None, "no step has begun"
        return self._rows

    def begin_step(self, rotating: RotatingRows) -> None:
        """Give the CPU a step's descriptor.

        Raises:
            StepError: An earlier step's attention failed.
        """
        self._num_steps += 1
        self._rows = rotating
        self._before, self._now = self._now, self._turns[self._num_steps % _NUM_TURNS]
        turn = self._now
        if turn in self._open:
            self.end_steps(before=turn.step + 1)
        lanes = [(i, lane) for i, lane in enumerate(rotating.lanes) if lane is not None]
        turn.step, turn.at = self._num_steps, {i: at for at, (i, _) in enumerate(lanes)}
        turn.tickets = {}
        if not lanes:
            return
        turn.service.begin_step(
            self._k_pool,
            self._v_pool,
            [Lane(block_tables=lane.block_tables, seq_lens=lane.seq_lens) for _, lane in lanes],
            self._scale,
        )
        self._open.append(turn)
        turn.tickets = {i: turn.service.first_ticket(at) for i, at in turn.at.items()}

    def depart(self, layer: int, qkv: torch.Tensor) -> None:
        """Hand over a layer's rotated rows, `[n, (num_q_heads + 2 * num_kv_heads) * head_dim]`.

        The segment's last layer rings for all of them.
        """
        rotating, turn = self.rows, self._now
        number, segment = _segment_of(rotating, layer)
        at = turn.at.get(number)
        if at is None:
            return
        first = rotating.bounds[segment.start]
        rows = rotating.departing(layer)
        to = turn.rows if self._sent is None else self._sent
        if qkv.shape[0]:
            to[at, rows.start - first : rows.stop - first].copy_(qkv)
        if layer == segment.stop - 1:
            if self._sent is not None:
                num_rows = rotating.bounds[segment.stop] - first
                turn.rows[at, :num_rows].copy_(self._sent[at, :num_rows], non_blocking=True)
            turn.bells.ring(at, turn.tickets[number])

    def arrive(self, layer: int, out: torch.Tensor) -> None:
        """Fill in answers to what departed at a layer in the last overlap step.

        Args:
            layer: Of the model.
            out: `[n, num_q_heads * head_dim]`, of `rows.arriving(layer)`.

        Raises:
            StepError: The device is the CPU and the service has failed.
        """
        rotating = self.rows
        number, segment = _segment_of(rotating, layer)
        rows = rotating.arriving(layer)
        arriving_before = rows.start - rotating.bounds[segment.start + 1]
        answers = self._answers(number, is_first=arriving_before == 0)
        torch.index_select(answers, 0, rotating.answers[rows], out=out)

    def _answers(self, number: int, *, is_first: bool) -> torch.Tensor:
        """Wait for a segment's answers, once a step, and return them."""
        turn = self._before
        at = turn.at[number]
        if is_first:
            try:
                turn.bells.wait(at, turn.tickets[number])
            except ServiceError as error:
                raise StepError(f"CPU attention failed: {error}") from error
            if self._received is not None:
                self._received[at].copy_(turn.out[at], non_blocking=True)
        return turn.out[at] if self._received is None else self._received[at]

    def end_steps(self, before: int) -> HostStepTimes | None:
        """Wait until the CPU has left all overlap steps before one.

        Args:
            before: The number of that step, see `num_steps`.

        Returns:
            What it did in them; None if there were none. `waiting_s` is 0: each has a service of
            its own, which knows nothing of what the others do meanwhile.

        Raises:
            StepError: Its attention failed or was overdue.
        """
        reports: list[tuple[StepReport, float]] = []
        while self._open and self._open[0].step < before:
            turn = self._open[0]
            try:
                report = turn.service.end_step()
            except ServiceError as error:
                raise StepError(f"CPU attention failed: {error}") from error
            self._open.popleft()
            reports.append((report, turn.bells.take_waiting_s()))
        if not reports:
            return None
        return HostStepTimes(
            attention_s=(sum(sum(report.attention_s) for report, _ in reports),),
            waiting_s=0.0,
            handover_s=reports[-1][0].handover_s,
            device_waiting_s=sum(waiting_s for _, waiting_s in reports),
        )

    def abandon(self, reason: str) -> None:
        """Give all open steps up and release everything that waits for them."""
        for turn in self._open:
            turn.service.abort_step(reason)

    def forget(self) -> None:
        """Leave steps that were given up; what waits for them on the device must be gone."""
        while self._open:
            turn = self._open.popleft()
            with contextlib.suppress(ServiceError):  # whose reason has been told
                turn.service.end_step()
            turn.bells.take_waiting_s()

    def close(self) -> None:
        """Stop the services."""
        for turn in self._turns:
            turn.service.close()


def _segment_of(rotating: RotatingRows, layer: int) -> tuple[int, range]:
    for number, segment in enumerate(rotating.segments):
        if layer in segment:
            return number, segment
    raise ValueError(f"layer: expected one of the model's, got {layer}")
