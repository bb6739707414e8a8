"""Attention on the CPU for rotating rows: handed over in one overlap step, answered in the next.

Each turn has a service, rows and bells of its own, so that a step can begin while the CPU is still
busy with the one before it. All turns share the attention threads and the host pool, which is seen
as one layer whose blocks count through all of the model's.

Rows and answers cross PCIe on a stream beside the step's: rows once a segment's last layer has
them, answers while the layers before those that need them compute. Of some rows the device computes
the attention itself, on another such stream: see `engine.direct_rows`.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.step import StepReport
from engine.backends.base import AttentionShape, HostStepTimes
from engine.backends.channels import Channels
from engine.backends.side_stream import Mark, SideStream
from engine.backends.turns import Turn, make_turns
from engine.batch import HostDecodeRows, RotatingRows
from engine.direct_rows import deferred_segments
from engine.errors import StepError

_NUM_TURNS = 3
"""One that is being computed by the device, one before it that the CPU answers, one ahead."""

_Allocate = Callable[[tuple[int, ...], torch.dtype, CpuAttention], torch.Tensor]
AttendDirectly = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Fills answers, `[num_answers, q_width]`, from rows that were handed over, `[max_rows, width]`, by
a segment's entries, `[ENTRY_FIELDS, n]`, and blocks, `[num_blocks]`; see `DirectRows`."""
_ChannelsOver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], Channels | None]


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
        channels_over: Makes channels over rows, answers and bells; None if the device is the CPU.
        attend_directly: How the device attends to rows itself.
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
        channels_over: _ChannelsOver,
        attend_directly: AttendDirectly,
        timeout_s: float,
    ) -> None:
        self._num_segments = num_segments
        self._scale = shape.softmax_scale
        k_pool, v_pool = pools
        self._k_pool = k_pool.view(1, -1, *k_pool.shape[2:])
        self._v_pool = v_pool.view(1, -1, *v_pool.shape[2:])
        q_width = shape.num_q_heads * shape.head_dim
        width = q_width + 2 * shape.num_kv_heads * shape.head_dim
        num_slots = _NUM_TURNS * num_segments
        all_rows = allocate((num_slots, max_rows, width), shape.dtype, kernels)
        all_out = allocate((num_slots, max_rows, q_width), shape.dtype, kernels)
        all_bells = allocate((num_slots, 2, 16), torch.int32, kernels)
        self._turns = make_turns(
            kernels,
            shape,
            num_lanes=num_segments,
            num_layers=1,
            rows=all_rows,
            out=all_out,
            bells=all_bells,
            timeout_s=timeout_s,
        )
        rows, out = self._turns[0].rows, self._turns[0].out
        # On a GPU, rows are collected and answers unpacked there: one copy a segment each way.
        self._channels = channels_over(all_rows, all_out, all_bells, 2 * num_segments)
        self._sent = torch.empty_like(rows, device=device)
        # The CPU's answers, and behind them those of the device to the rows of two steps.
        self._max_rows = max_rows
        num_answers = (num_segments, 3 * max_rows, q_width)
        self._received = torch.empty(num_answers, dtype=out.dtype, device=device)
        self._attend_directly = attend_directly
        self._side = SideStream(device)
        self._crossing = SideStream(device)
        self._arrived: dict[int, Mark] = {}
        self._deferred = deferred_segments(num_segments)
        self._marks: dict[int, Mark] = {}
        self._open: deque[Turn] = deque()
        self._num_steps = 0
        self._rows: RotatingRows | None = None
        self._now = self._before = self._turns[0]

    @property
    def num_steps(self) -> int:
        """Overlap steps begun."""
        return self._num_steps

    @property
    def rows(self) -> RotatingRows:
        """The rows that were announced last."""
        assert self._rows is not None, "no rows were announced"
        return self._rows

    def announce(self, rotating: RotatingRows) -> None:
        """Say which rows the calls that follow are about."""
        self._rows = rotating

    def begin_step(self, segments: Sequence[HostDecodeRows | None]) -> None:
        """Give the CPU a step's descriptor.

        Args:
            segments: What it is to attend to in each; see `RotatingRows.lanes`.

        Raises:
            StepError: An earlier step's attention failed.
        """
        self._num_steps += 1
        self._before, self._now = self._now, self._turns[self._num_steps % _NUM_TURNS]
        turn = self._now
        if turn in self._open:
            self.end_steps(before=turn.step + 1)
        parts = [(i, rows) for i, rows in enumerate(segments) if rows is not None]
        turn.step, turn.orders = self._num_steps, {}
        if parts:
            turn.begin_step(self._k_pool, self._v_pool, parts, self._scale)
            self._open.append(turn)
        if self._channels is not None:
            # A segment has a channel for its rows, and one for the answers to those before.
            asked = {self._num_segments + i: o for i, o in self._before.orders.items()}
            self._channels.begin_step(turn.orders | asked)

    def begin_layer(self, layer: int) -> None:
        """Do what must be done before a layer's rows depart.

        The first answers set out, and the device begins with what the last overlap step left to it.
        Before rows of the segment take their places, it must be done with those that were there.
        """
        if layer == 0:
            self._fetch(0)
        if self.rows.direct is None:
            return
        if layer == 0:
            for number in self._deferred:
                self._marks[number] = self._attend(number, self._before)
        number, segment = _segment_of(self.rows, layer)
        if layer == segment.start and number in self._deferred:
            self._side.wait(self._marks.pop(number))

    def _attend(self, number: int, turn: Turn) -> Mark:
        """Let the device attend to a segment's rows that were handed over in a turn."""
        direct = self.rows.direct
        assert direct is not None
        rows = self._sent[number]
        if self._channels is None:
            if number not in turn.orders:
                return None
            rows = turn.rows_of(number)
        answers, entries, blocks = self._received, direct.entries, direct.blocks
        return self._side.run(
            lambda: self._attend_directly(answers[number], rows, entries[number], blocks[number])
        )

    def _fetch(self, number: int) -> None:
        """Let a segment's answers to the last overlap step come, once the CPU has them."""
        channels = self._channels
        if channels is None:
            return
        answers = self._received[number, : self._max_rows]
        channel = self._num_segments + number
        self._arrived[number] = self._crossing.run(
            lambda: channels.receive(channel, 0, answers, beside=True)
        )

    def join(self) -> None:
        """Let later work of the device wait for its attention to rows, and for what crosses."""
        self._side.join()
        self._crossing.join()

    def sent(self, layer: int) -> torch.Tensor | None:
        """Return where a layer's departing rows are to be written, before it is rung for them.

        Returns:
            `[n, (num_q_heads + 2 * num_kv_heads) * head_dim]`: rotated Q and K, and V, of
            `rows.departing(layer)`; None if nobody wants them: they are rows to spare.
        """
        rotating, turn = self.rows, self._now
        number, segment = _segment_of(rotating, layer)
        first, rows = rotating.bounds[segment.start], rotating.departing(layer)
        part = slice(rows.start - first, rows.stop - first)
        if self._channels is not None:
            return self._sent[number, part]
        return turn.rows_of(number)[part] if number in turn.orders else None

    def ring(self, layer: int) -> None:
        """Hand over the rows of the layer's segment if it is the last of them."""
        rotating, turn = self.rows, self._now
        number, segment = _segment_of(rotating, layer)
        if layer != segment.stop - 1:
            return
        channels = self._channels
        if channels is not None:
            num_rows = rotating.bounds[segment.stop] - rotating.bounds[segment.start]
            sent = self._sent[number, :num_rows]
            self._crossing.run(lambda: channels.send(number, 0, sent, beside=True))
            if number + 1 < self._num_segments:
                self._fetch(number + 1)
        elif number in turn.orders:
            turn.ring(number)
        if rotating.direct is not None and number not in self._deferred:
            self._attend(number, turn)

    def answers(self, layer: int) -> torch.Tensor:
        """Return answers to what departed in the last overlap step, and wait for them if need be.

        Args:
            layer: Of the model; those of its segment are waited for at its first layer with rows.

        Returns:
            `[n, num_q_heads * head_dim]`; `rows.answers[rows.arriving(layer)]` says which are the
            layer's.

        Raises:
            StepError: The device is the CPU and the service has failed.
        """
        rotating, turn = self.rows, self._before
        number, segment = _segment_of(rotating, layer)
        is_first = rotating.arriving(layer).start == rotating.bounds[segment.start + 1]
        if self._channels is not None:
            if is_first:
                self._crossing.wait(self._arrived.pop(number))
        elif number in turn.orders and is_first:
            num_rows = turn.orders[number].num_rows
            self._received[number, :num_rows] = turn.wait(number)[:num_rows]
        return self._received[number]

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
            report = turn.end_step()
            self._open.popleft()
            reports.append((report, self._take_waiting_s(turn)))
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
        self._side.forget()
        self._crossing.forget()
        while self._open:
            turn = self._open.popleft()
            with contextlib.suppress(StepError):  # whose reason has been told
                turn.end_step()
            self._take_waiting_s(turn)
        for turn in self._turns:
            turn.orders = {}

    def _take_waiting_s(self, turn: Turn) -> float:
        bells = turn.bells if self._channels is None else self._channels
        return bells.take_waiting_s()

    def close(self) -> None:
        """Stop the services."""
        for turn in self._turns:
            turn.service.close()


def _segment_of(rotating: RotatingRows, layer: int) -> tuple[int, range]:
    for number, segment in enumerate(rotating.segments):
        if layer in segment:
            return number, segment
    raise ValueError(f"layer: expected one of the model's, got {layer}")
