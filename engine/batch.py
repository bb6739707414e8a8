"""One step's batch as tensors: which tokens, at which positions, in which KV slots.

Rows come decodes first, then prefill chunks. Everything is filled into one pinned buffer and moved
to the device with a single copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.kv_blocks import BlockPool
from engine.scheduler import ScheduledRequest, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step's input on the device. T tokens, S requests, of which the first D are decodes.

    Args:
        num_decodes: D; each has one token, and they come first in every tensor.
        input_ids: `[T]`, int64, device.
        positions: `[T]`, int64, device.
        slot_mapping: `[T]`, int64, device; `block_id * block_size + offset` of each token.
        prefill_cu_seqlens_q: `[S - D + 1]`, int32, device; where each prefill's tokens begin among
            the prefills' tokens.
        seq_lens: `[S]`, int32, device; tokens in the cache after this step.
        block_tables: `[S, max_blocks]`, int32, device; unused entries are 0.
        logits_rows: `[L]`, int64, device; tokens whose logits are wanted.
        query_lens: Tokens of each request, on the host.
        context_lens: Tokens in the cache after this step of each request, on the host.
    """

    num_decodes: int
    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    prefill_cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    logits_rows: torch.Tensor
    query_lens: Sequence[int]
    context_lens: Sequence[int]

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.query_lens)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens after the decodes."""
        return int(self.input_ids.shape[0]) - self.num_decodes


class BatchBuilder:
    """Turns step plans into batches.

    Args:
        device: Where batches go.
        pool: Whose block tables they name.
    """

    def __init__(self, device: torch.device, pool: BlockPool) -> None:
        self._device = device
        self._pool = pool

    def build(self, plan: StepPlan) -> Batch:
        """Return the plan's batch on the device."""
        items = plan.scheduled
        wide, narrow = self._wide(items), self._narrow(plan)
        staging = np.concatenate([wide.view(np.int32), narrow])
        host = torch.from_numpy(staging)
        if self._device.type == "cuda":
            host = host.pin_memory()
        on_device = host.to(self._device, non_blocking=True)
        num_tokens, num_seqs, num_starts = plan.num_tokens, len(items), len(plan.prefills) + 1
        ids, positions, slots, logits = (
            on_device[: 2 * wide.size]
            .view(torch.int64)
            .split([num_tokens, num_tokens, num_tokens, wide.size - 3 * num_tokens])
        )
        cu_seqlens, seq_lens, tables = on_device[2 * wide.size :].split(
            [num_starts, num_seqs, narrow.size - num_starts - num_seqs]
        )
        return Batch(
            num_decodes=len(plan.decodes),
            input_ids=ids,
            positions=positions,
            slot_mapping=slots,
            prefill_cu_seqlens_q=cu_seqlens,
            seq_lens=seq_lens,
            block_tables=tables.view(num_seqs, -1),
            logits_rows=logits,
            query_lens=[item.num_tokens for item in items],
            context_lens=[item.end for item in items],
        )

    def _wide(
        self, items: Sequence[ScheduledRequest]
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return input ids, positions, slots and logits rows in one int64 array."""
        ids: list[int] = []
        for item in items:
            ids.extend(item.request.token_ids(item.start, item.end))
        positions = [np.arange(item.start, item.end) for item in items]
        slots = [self._slots(item) for item in items]
        ends = np.cumsum([item.num_tokens for item in items])
        logits = ends[[item.samples for item in items]] - 1
        return np.concatenate([np.asarray(ids), *positions, *slots, logits]).astype(np.int64)

    def _slots(self, item: ScheduledRequest) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        block_size = self._pool.block_size
        positions = np.arange(item.start, item.end)
        table = self._pool.block_table(item.request.request_id)
        first = item.start // block_size
        blocks = np.asarray(table[first : -(-item.end // block_size)], dtype=np.int64)
        return blocks[positions // block_size - first] * block_size + positions % block_size

    def _narrow(self, plan: StepPlan) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Return prefill starts, sequence lengths and block tables in one int32 array."""
        items = plan.scheduled
        starts = np.cumsum([0, *(item.num_tokens for item in plan.prefills)])
        seq_lens = [item.end for item in items]
        width = max(self._pool.blocks_for(length) for length in seq_lens)
        tables = np.zeros((len(items), width), dtype=np.int32)
        for row, item in enumerate(items):
            used = self._pool.blocks_for(item.end)
            tables[row, :used] = self._pool.block_table(item.request.request_id)[:used]
        return np.concatenate([starts, seq_lens, tables.ravel()]).astype(np.int32)
