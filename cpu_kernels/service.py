"""The attention service: a whole step's CPU attention, asked for and answered through doorbells.

Checks tensors and hands their addresses to the compiled service; between a request bell and its
answer there is no Python. On CUDA the bells, rows and outputs lie in pinned memory, and the GPU
rings and waits (`cuStreamWriteValue32`, `cuStreamWaitValue32` with GEQ); where the device is a CPU,
`ring` and `wait` do. Which rows go into which lane is the engine's business.
"""

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.checks import check_buffers, check_group, check_ints, check_pools
from cpu_kernels.step import Lane, StepReport

# How long waits of a step poll without yielding the core. A layer of a large model takes the device
# 0.1 to 0.3 ms; sleeping and waking costs 10 to 50 µs.
DEFAULT_SPIN_US = 200


class StepQueue:
    """The order of steps of several services that share threads: see `AttentionService`.

    Args:
        attention: Whose threads.
    """

    def __init__(self, attention: CpuAttention) -> None:
        self.native = attention.native.module.StepQueue()


class AttentionService:
    """Answers each layer's decode attention of host-resident rows, driven by doorbells.

    A step runs from `begin_step` to `end_step`. For each layer, and in it for each lane in order,
    the service waits until the request bell reaches `first_ticket(lane) + layer`, attends with the
    rows' K and V appended in the same pass, writes `out` and rings the answer bell with the ticket.
    Tickets count on from step to step, modulo 2**32, compared by the sign of the difference.

    A step fails if attention raises, if `abort_step` or `close` is called, or if neither a ring nor
    an answer comes for `timeout_s`. Then the step's last ticket is rung on every answer bell, so
    that all waits pass, and `wait` and `end_step` raise; the next step works as if nothing had
    happened. `out` and the new tokens' K and V are undefined after a failed step.

    Every call may come from any thread. The other calls of `attention` remain allowed: they take
    turns with the service between its answers. Between steps the service uses no processor time.

    Args:
        attention: Whose threads and kernels to use; the service takes part as one of its threads,
            which it then has one fewer of for itself. Close the service first.
        num_layers: Layers of a step.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Head size.
        rows: Rotated Q, K and V side by side, written by the device:
            `[num_lanes, max_rows, (num_q_heads + 2 * num_kv_heads) * head_dim]`, bf16, fp16 or
            fp32, CPU, contiguous; pinned for CUDA.
        out: Written by the service: `[num_lanes, max_rows, num_q_heads * head_dim]`, likewise.
        bells: `[num_lanes, 2, 16]`, int32, CPU, contiguous, aligned to 64 bytes: `[lane, 0, 0]` is
            the request bell, `[lane, 1, 0]` the answer bell. Tickets count on from the request
            bells as they are; the answer bells are set to the same.
        timeout_s: A step in which nothing happens for so long fails; at least 0.001 s.
        spin_us: How long a wait polls without pause, µs; it then yields the core between looks for
            ten times as long, then sleeps some 0.1 ms between them. Default: 200 where `attention`
            polls at all, else 0.
        queue: Services with the same one serve their steps one after the other, in the order of
            `begin_step`, whichever rows come first; None: this one waits for no other.

    Raises:
        ValueError: An argument has the wrong shape, type, layout or range.
    """

    def __init__(
        self,
        attention: CpuAttention,
        *,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rows: torch.Tensor,
        out: torch.Tensor,
        bells: torch.Tensor,
        timeout_s: float = 10.0,
        spin_us: int | None = None,
        queue: StepQueue | None = None,
    ) -> None:
        if not 1 <= num_layers < 2**20:
            raise ValueError(f"num_layers: expected 1 to {2**20 - 1}, got {num_layers}")
        if not 0.001 <= timeout_s <= 1e6:
            raise ValueError(f"timeout_s: expected 0.001 to 1,000,000 s, got {timeout_s}")
        if spin_us is None:
            spin_us = DEFAULT_SPIN_US if attention.spin_us else 0
        if not 0 <= spin_us <= 1_000_000:
            raise ValueError(f"spin_us: expected 0 to 1,000,000 µs, got {spin_us}")
        check_group(num_q_heads, num_kv_heads)
        check_buffers(rows, out, bells, num_q_heads, num_kv_heads, head_dim)
        self._kernels = kernels = attention.native
        self._num_layers = num_layers
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._num_lanes, self._max_rows = rows.shape[:2]
        self._num_lanes_now = 0
        shape = kernels.module.ServiceShape(
            num_layers=num_layers,
            num_lanes=self._num_lanes,
            max_rows=self._max_rows,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            element=kernels.element(rows),
            rows=rows.data_ptr(),
            out=out.data_ptr(),
        )
        native = kernels.module.Service(
            context=kernels.context,
            shape=shape,
            bells=bells.data_ptr(),
            timeout_s=timeout_s,
            spin_us=spin_us,
            queue=(queue or StepQueue(attention)).native,
        )
        # Dropping the only strong reference to the service joins its threads, also at exit; the
        # memory they use is kept until then.
        self._holder = [native]
        self._pools: list[torch.Tensor] = []
        memory = [rows, out, bells, self._pools]
        self._finalizer = weakref.finalize(self, _drop, self._holder, memory)

    @property
    def _native(self) -> Any:
        if not self._holder:
            raise ValueError("AttentionService: it has been closed")
        return self._holder[0]

    def begin_step(
        self,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        lanes: Sequence[Lane],
        softmax_scale: float,
    ) -> None:
        """Start serving a step; the pools must not be written elsewhere where the step reads them.

        Args:
            k_pool: K of all layers, `[num_layers, ...]` of `host_kv_shapes`, contiguous, CPU.
            v_pool: V, likewise, same type.
            lanes: 1 to `num_lanes` lanes of 1 to `max_rows` requests; copied. A `seq_lens` of 0
                makes the row of `out` zeros and appends nothing.
            softmax_scale: Factor of the scores.

        Raises:
            ValueError: An argument has the wrong shape, type, stride or device, or a length or
                block id is out of range; nothing has been started then.
            ServiceError: The previous step was not ended, or its attention, given up, still runs
                after `timeout_s`.
        """
        check_pools(k_pool, v_pool, self._num_layers, self._num_kv_heads, self._head_dim)
        if not 1 <= len(lanes) <= self._num_lanes:
            raise ValueError(f"lanes: expected 1 to {self._num_lanes} lanes, got {len(lanes)}")
        step = self._kernels.module.Step(
            first_layer=self._kernels.layer(k_pool[0], v_pool[0]), softmax_scale=softmax_scale
        )
        for i, lane in enumerate(lanes):
            num_seqs = lane.seq_lens.numel()
            if not 1 <= num_seqs <= self._max_rows:
                raise ValueError(
                    f"lanes[{i}]: expected 1 to {self._max_rows} requests, got {num_seqs}"
                )
            check_ints(f"lanes[{i}].seq_lens", lane.seq_lens, (num_seqs,), torch.int32)
            check_ints(f"lanes[{i}].block_tables", lane.block_tables, (num_seqs, None), torch.int32)
            step.add_lane(
                block_tables=lane.block_tables.data_ptr(),
                stride=lane.block_tables.stride(0),
                max_blocks=lane.block_tables.shape[1],
                seq_lens=lane.seq_lens.data_ptr(),
                num_seqs=num_seqs,
            )
        self._native.begin_step(step)
        self._pools[:] = [k_pool, v_pool]
        self._num_lanes_now = len(lanes)

    def first_ticket(self, lane: int) -> int:
        """Return the ticket of layer 0 in the step begun last, 0 to 2**32 - 1."""
        ticket: int = self._native.first_ticket(lane)
        return ticket

    def ring(self, lane: int, ticket: int) -> None:
        """Ring a request bell where the device is a CPU: the lane's rows are written."""
        self._native.ring(lane, ticket % 2**32)

    def wait(self, lane: int, ticket: int) -> None:
        """Wait until a lane's answer bell reaches a ticket of the step; the GIL is free meanwhile.

        Raises:
            ServiceError: The step failed.
            ValueError: The ticket is later than the step's last, or there is no such lane.
        """
        self._native.wait(lane, ticket % 2**32)

    def end_step(self, timeout_s: float | None = None) -> StepReport:
        """Wait until the step is served and report on it; the GIL is free meanwhile.

        Args:
            timeout_s: Give the step up after so long; None: only when nothing happens for the
                service's own timeout.

        Raises:
            ServiceError: The step failed, and why, or none is open. The step is ended all the same.
                If its attention still runs, the message says so: `out` and the new tokens' slots
                may then be written until `begin_step`, or any call of `attention`, returns.
        """
        if timeout_s is not None and not 0 <= timeout_s <= 1e6:
            raise ValueError(f"timeout_s: expected 0 to 1,000,000 s or None, got {timeout_s}")
        timeline = torch.empty(self._num_layers, self._num_lanes_now, 4, dtype=torch.int64)
        report = self._native.end_step(timeout_s, timeline.data_ptr())
        return StepReport(
            num_layers=self._num_layers,
            attention_s=tuple(report.attention_s),
            waiting_s=report.waiting_s,
            handover_s=report.handover_s,
            wall_s=report.wall_s,
            timeline_ns=timeline,
        )

    def abort_step(self, reason: str) -> None:
        """Give up the open step, if there is one: all waits pass, `wait` and `end_step` raise."""
        self._native.abort_step(reason)

    def close(self) -> None:
        """Give up an open step and end the threads; a second call does nothing.

        Raises:
            ServiceError: Attention of a step that was given up still runs; close again later.
        """
        if self._holder:
            self._holder[0].close()
        self._finalizer()

    def __enter__(self) -> "AttentionService":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _drop(holder: list[Any], memory: list[Any]) -> None:
    """Drop the service, and only then the memory that it works on."""
    holder.clear()
    memory.clear()
