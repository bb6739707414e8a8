"""One sub-batch as tensors: which tokens, at which positions, in which KV slots.

Rows come in four groups, in this order: decodes and prefill chunks whose KV is on the device,
prefill chunks whose KV goes to the host, decodes whose KV is on the host. In overlap mode, rotating
rows come behind them, others in each layer. A chunk that goes to the host is attended to in blocks
that are addressed like a pool: on a CPU device these are the host pool's own; on a GPU they are
staging blocks, which hold one layer of the request at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRows:
    """Rows whose KV one pool holds. T tokens, S requests, of which the first D are decodes.

    There may be more places than rows. A decode to spare has length 0; decode attention may run
    beside prefill attention and must leave its row alone, which may be a prefill's. Prefills to
    spare begin where the last one ends, and tokens to spare have slot -1.

    Args:
        num_decodes: D; each has one token, and they come first.
        slot_mapping: `[T]`, int64, device; `block_id * block_size + offset` of each token.
        prefill_cu_seqlens_q: `[S - D + 1]`, int32, device; the rows where each prefill begins, and
            where the last one ends.
        seq_lens: `[S]`, int32, device; tokens in the cache after this step.
        block_tables: `[S, max_blocks]`, int32, device; unused entries are 0.
        max_decode_len: About what the longest decode has in the cache; it steers only how
            attention is cut.
        num_splits: Into how many splits decode attention cuts a request; None: as it sees fit.
    """

    num_decodes: int
    slot_mapping: torch.Tensor
    prefill_cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    max_decode_len: int
    num_splits: int | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.slot_mapping.shape[0])

    @property
    def num_seqs(self) -> int:
        """S."""
        return int(self.seq_lens.shape[0])

    @property
    def has_prefills(self) -> bool:
        """Whether there are places for prefills."""
        return self.num_seqs > self.num_decodes


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedCopy:
    """Blocks of one layer that move between staging and the host pool.

    Args:
        staging_ids: `[n]`, int32, device.
        host_ids: `[n]`, int32, device.
    """

    staging_ids: torch.Tensor
    host_ids: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPrefillRows:
    """Prefill chunks whose KV goes to the host.

    Args:
        rows: Their tokens, in the host pool's blocks (CPU device) or in staging blocks (GPU).
        num_staging_blocks: Staging blocks that one layer needs; 0 on a CPU device.
        prefix: What must be in staging before a layer's attention; None if there is no prefix.
        written: What must leave staging after it; None on a CPU device.
    """

    rows: PagedRows
    num_staging_blocks: int = 0
    prefix: StagedCopy | None = None
    written: StagedCopy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDecodeRows:
    """Decodes whose KV is on the host.

    Args:
        block_tables: `[S, max_blocks]`, int32, CPU.
        seq_lens: `[S]`, int32, CPU; tokens attended to, the new one included.
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def num_seqs(self) -> int:
        """S."""
        return int(self.seq_lens.shape[0])


@dataclass(frozen=True, slots=True)
class HostWork:
    """What the CPU is to attend to in a step.

    Args:
        decodes: Of each lane, None where there are none.
        rotating: Of each segment, None where there are none; None if the step has no rotating rows.
    """

    decodes: Sequence[HostDecodeRows | None] = ()
    rotating: Sequence[HostDecodeRows | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectRows:
    """What the device attends to of rotating rows, from the host pool; see `engine.direct_rows`.

    Args:
        entries: `[num_segments, ENTRY_FIELDS, n]`, int32, device; entries to spare have length 0.
        blocks: `[num_segments, num_blocks]`, int32, device; ids count through the layers, those of
            an entry begin at its first.
    """

    entries: torch.Tensor
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RotatingRows:
    """Host-resident decodes that are in the batch for one layer each; see `RotatingRow`.

    N rows, in the order of the layers whose Q, K and V they get. The layers are cut into segments:
    the CPU is handed all rows of a segment at once, and answers them at once.

    Args:
        bounds: `num_layers + 2` numbers: rows `bounds[i]` to `bounds[i + 1]` get Q, K and V of
            layer `i`, and rejoined behind the attention of the layer before it. The last ones
            behind the last layer's, and get a token; the first ones enter with theirs.
        segments: Layers of each segment.
        lanes: What the CPU attends to for each segment, in row order; None where there is nothing.
            Block ids count through the layers: block `b` of layer `i` is `i * num_blocks + b`.
        positions: `[N]`, int64, device.
        slots: `[N]`, int64, device; where in `residuals` each row's residual stream is.
        residuals: `[num_slots, H]`, device; kept from step to step.
        answers: `[N]`, int64, device; of each row that rejoins, its place among those that its
            segment handed over in the last overlap step.
        direct: What the device attends to itself; None if it leaves all to the CPU.
    """

    bounds: Sequence[int]
    segments: Sequence[range]
    lanes: Sequence[HostDecodeRows | None]
    positions: torch.Tensor
    slots: torch.Tensor
    residuals: torch.Tensor
    answers: torch.Tensor
    direct: DirectRows | None = None

    def departing(self, layer: int) -> slice:
        """Return which rows get Q, K and V of a layer."""
        return slice(self.bounds[layer], self.bounds[layer + 1])

    def arriving(self, layer: int) -> slice:
        """Return which rows rejoin behind a layer's attention."""
        return self.departing(layer + 1)

    @property
    def most_at_once(self) -> int:
        """Most rows that are in the batch together."""
        return max(b - a for a, b in pairwise(self.bounds))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """Rows of one request whose next tokens are known and are to be scored.

    Args:
        request_id: Whose.
        first_row: Of the batch; the others follow.
        start: Index in the prompt of the token that comes after the first row.
        token_ids: The tokens that come next, one a row.
        num_top: How many of the likeliest tokens are wanted beside each.
    """

    request_id: str
    first_row: int
    start: int
    token_ids: list[int]
    num_top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A sub-batch's input.

    Args:
        input_ids: `[T]`, int64, device.
        positions: `[T]`, int64, device.
        logits_rows: `[L]`, int64, device; tokens whose logits are wanted; None: all.
        device_rows: The first rows; may be empty.
        host_prefills: The next rows, if there are any.
        host_decodes: The last rows, if there are any.
        rotating: Rows that come and go, if there are any; those that enter are the last tokens of
            `input_ids`, and `logits_rows` counts those that rejoin behind the last layer as if they
            followed all others.
        sources: `[T]`, int64, device; where a token is the last step's to sample, its place there,
            elsewhere `NO_SOURCE`; None where there are no such tokens.
        sampled: `[any]`, int64, device; the last step's tokens, needed with `sources`.
        scored: Prompt rows whose next tokens' log-probabilities are wanted.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_rows: torch.Tensor | None
    device_rows: PagedRows
    host_prefills: HostPrefillRows | None = None
    host_decodes: HostDecodeRows | None = None
    rotating: RotatingRows | None = None
    sources: torch.Tensor | None = None
    sampled: torch.Tensor | None = None
    scored: Sequence[ScoredRows] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.input_ids.shape[0])

    @property
    def num_resident_tokens(self) -> int:
        """Tokens that go through every layer."""
        return self.num_tokens - (self.rotating.bounds[1] if self.rotating is not None else 0)

    @property
    def host_prefill_tokens(self) -> slice:
        """Where the tokens of `host_prefills` are."""
        start = self.device_rows.num_tokens
        size = self.host_prefills.rows.num_tokens if self.host_prefills is not None else 0
        return slice(start, start + size)

    @property
    def host_decode_tokens(self) -> slice:
        """Where the tokens of `host_decodes` are."""
        return slice(self.host_prefill_tokens.stop, self.num_resident_tokens)


def host_work_of(batches: Sequence[Batch]) -> HostWork:
    """Return what the CPU is to attend to for some sub-batches."""
    rotating = [batch.rotating for batch in batches if batch.rotating is not None]
    return HostWork(
        decodes=[batch.host_decodes for batch in batches],
        rotating=rotating[0].lanes if rotating else None,
    )
