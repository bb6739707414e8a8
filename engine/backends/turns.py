"""Steps of the CPU's attention that take turns, so that one can begin before another is done.

Each turn has a service, rows, answers and bells of its own; all share the attention threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.errors import ServiceError
from cpu_kernels.service import AttentionService, StepQueue
from cpu_kernels.step import Lane, StepReport
from engine.backends.base import AttentionShape
from engine.backends.channels import Order
from engine.backends.doorbells import HostDoorbells
from engine.batch import HostDecodeRows
from engine.errors import StepError


@dataclass(slots=True, eq=False)
class Turn:
    """What one step hands over.

    `orders` says for each part of the step with rows (a lane of it, or a segment of its layers)
    which of the service's lanes it has in this step, as a slot among those of all turns, and its
    ticket; `first_slot` is that of the turn, `step` the number of the step.
    """

    service: AttentionService
    bells: HostDoorbells
    rows: torch.Tensor
    out: torch.Tensor
    first_slot: int
    step: int = 0
    orders: dict[int, Order] = field(default_factory=dict)

    def begin_step(
        self,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        parts: Sequence[tuple[int, HostDecodeRows]],
        scale: float,
    ) -> None:
        """Give the service what to attend to.

        Args:
            k_pool: K of the host pool, as the service sees it.
            v_pool: V of it.
            parts: Those with rows, by number.
            scale: Of the scores.
        """
        lanes = [Lane(block_tables=rows.block_tables, seq_lens=rows.seq_lens) for _, rows in parts]
        self.service.begin_step(k_pool, v_pool, lanes, scale)
        self.orders = {
            part: Order(self.service.first_ticket(lane), rows.num_seqs, self.first_slot + lane)
            for lane, (part, rows) in enumerate(parts)
        }

    def rows_of(self, part: int) -> torch.Tensor:
        """Return where a part's rows are handed over, `[max_rows, row_width]`."""
        return self.rows[self._lane(part)]

    def ring(self, part: int, offset: int = 0) -> None:
        """Announce a part's rows to the service; the device is the CPU.

        Args:
            part: Which.
            offset: Added to its ticket.
        """
        self.bells.ring(self._lane(part), self.orders[part].ticket + offset)

    def wait(self, part: int, offset: int = 0) -> torch.Tensor:
        """Wait for a part's answer; the device is the CPU.

        Args:
            part: Which.
            offset: Added to its ticket.

        Returns:
            `[max_rows, q_width]`.

        Raises:
            StepError: The service has failed.
        """
        try:
            self.bells.wait(self._lane(part), self.orders[part].ticket + offset)
        except ServiceError as error:
            raise _step_error(error) from error
        return self.answers(part)

    def answers(self, part: int) -> torch.Tensor:
        """Return where a part's answers come, `[max_rows, q_width]`."""
        return self.out[self._lane(part)]

    def end_step(self) -> StepReport:
        """Wait until the service has left the step.

        Raises:
            StepError: It has failed.
        """
        try:
            return self.service.end_step()
        except ServiceError as error:
            raise _step_error(error) from error

    def _lane(self, part: int) -> int:
        return self.orders[part].slot - self.first_slot


def make_turns(
    kernels: CpuAttention,
    shape: AttentionShape,
    *,
    num_lanes: int,
    num_layers: int,
    rows: torch.Tensor,
    out: torch.Tensor,
    bells: torch.Tensor,
    timeout_s: float,
) -> list[Turn]:
    """Make turns over slots of shared memory; they are served in the order they are begun.

    Args:
        kernels: The attention threads.
        shape: The heads.
        num_lanes: Slots of a turn; all slots are a multiple of it.
        num_layers: Of a step, as the services see it.
        rows: `[num_slots, max_rows, row_width]`.
        out: `[num_slots, max_rows, q_width]`.
        bells: `[num_slots, 2, 16]`, int32.
        timeout_s: Rows or answers that take longer are overdue.
    """
    turns, queue = [], StepQueue(kernels)
    for first_slot in range(0, rows.shape[0], num_lanes):
        slots = slice(first_slot, first_slot + num_lanes)
        service = AttentionService(
            kernels,
            num_layers=num_layers,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rows=rows[slots],
            out=out[slots],
            bells=bells[slots],
            timeout_s=timeout_s,
            queue=queue,
        )
        turns.append(Turn(service, HostDoorbells(service), rows[slots], out[slots], first_slot))
    return turns


def _step_error(error: ServiceError) -> StepError:
    return StepError(f"CPU attention failed: {error}")
