"""What the model needs of a device, whoever plays it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.batch import Batch, HostWork
from engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """The attention heads of a model and the KV cache made for them.

    Args:
        num_layers: Layers with a cache of their own.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Elements of a head.
        block_size: Tokens of a KV block.
        dtype: Of the KV cache.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def softmax_scale(self) -> float:
        """Factor on the scores."""
        return float(self.head_dim**-0.5)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of K and V over all layers."""
        elements = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.block_size
        return elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Weights of the RMS norms on the heads of Q and K, `[head_dim]` each."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class NextNorm:
    """The RMSNorm behind a linear layer.

    Args:
        weight: `[H]`.
        eps: Added to the mean square.
        reader: Weight of the layer that alone reads the result; None if others do.
    """

    weight: torch.Tensor
    eps: float
    reader: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class NormedRows:
    """Rows behind an RMSNorm.

    Args:
        rows: `[T, H]`.
        lacking: What the layer that reads them has to do first, as the backend puts it; None if the
            rows are complete, as they are if the norm's reader is None.
    """

    rows: torch.Tensor
    lacking: Any = None


@dataclass(frozen=True, slots=True)
class SlottedTokens:
    """Where the host finds a step's tokens once the device has passed it.

    Args:
        token_ids: `[num_slots, most]`, int64, in memory that the device can write.
        slot: `[1]`, int64, device; the row that is the step's.
    """

    token_ids: torch.Tensor
    slot: torch.Tensor


@dataclass(frozen=True, slots=True)
class HostPoolSize:
    """Blocks of the host pool, and most host-resident decodes of one sub-batch."""

    num_blocks: int
    max_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStepTimes:
    """What the CPU did in one step, in seconds.

    Args:
        attention_s: Computing attention, for each lane, over all layers.
        waiting_s: Ready, but without rows to attend.
        handover_s: Median time between seeing rows and starting on them.
        device_waiting_s: The device's waiting for answers.
    """

    attention_s: tuple[float, ...]
    waiting_s: float
    handover_s: float
    device_waiting_s: float = 0.0


class DeviceMark(Protocol):
    """A point in the device's work."""

    def seconds_since(self, earlier: Any) -> float:
        """Return the time from an earlier mark to this one; both must have been passed."""


class Backend(Protocol):
    """Kernels and KV cache of one device."""

    @property
    def device(self) -> torch.device:
        """Where tensors live."""

    @property
    def description(self) -> str:
        """What computes what, for people."""

    @property
    def num_attention_threads(self) -> int:
        """Threads of CPU attention, 0 if there are none."""

    @property
    def runs_behind(self) -> bool:
        """Whether work is launched first and done later, so that the host can go ahead."""

    def mark(self) -> DeviceMark:
        """Mark the point after all work launched so far."""

    def num_decode_splits(self, num_seqs: int, max_seq_len: int) -> int:
        """Return into how many splits decode attention on the device cuts each request."""

    def prepare(self, config: ModelConfig, shape: AttentionShape) -> int:
        """Compile or load every kernel that serving the model will launch; return how many."""

    def allocate_kv_cache(
        self, shape: AttentionShape, num_blocks: int, host: HostPoolSize | None = None
    ) -> None:
        """Make the device pool and, if there is to be one, the host pool.

        Raises:
            CapacityError: Memory does not suffice.
        """

    def swap_out(self, device_blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy blocks of all layers from the device pool to the host pool, in step order."""

    def swap_in(
        self, device_blocks: Sequence[int], host_blocks: Sequence[int], *, beside: bool = False
    ) -> None:
        """Copy blocks of all layers from the host pool to the device pool, in step order.

        Args:
            device_blocks: Where to.
            host_blocks: Where from.
            beside: Nothing touches the blocks, on either side, before `join_arrivals`.
        """

    def join_arrivals(self) -> None:
        """Let work launched after this wait for blocks that were swapped in beside a step."""

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Announce a step and give the CPU its part of it."""

    def announce(self, batches: Sequence[Batch]) -> None:
        """Say that lane `i` of the calls that follow is `batches[i]`.

        Those that are captured in a graph are announced once; every launch then needs a
        `begin_host`.
        """

    def reserve_staging(self, lane: int, num_blocks: int) -> None:
        """Make room for a lane's prompts that go to the host, where it stays for captured steps."""

    def reserve_rotation(self, num_segments: int) -> None:
        """Make what rotating rows are handed over with, where it stays for captured steps.

        Args:
            num_segments: Hand-overs of a step.
        """

    def begin_host(self, work: HostWork) -> None:
        """Give the CPU a step's host-resident decodes, before the device begins the step.

        Raises:
            StepError: An earlier rotation failed.
        """

    def join_copies(self) -> None:
        """Let work launched after this wait for all copies of the step, but for arrivals."""

    def end_step(self) -> HostStepTimes | None:
        """Wait until the CPU has left the oldest step that was begun and not ended.

        Two at most may be open.

        Returns:
            Its times; None if the step had no host-resident rows.

        Raises:
            StepError: CPU attention failed or was overdue; the step's results are void.
        """

    @property
    def num_rotations(self) -> int:
        """Steps with rotating rows that were begun so far; the newest one's number."""

    def end_rotations(self, before: int) -> HostStepTimes | None:
        """Wait until the CPU has given all answers of rotations before one.

        Args:
            before: The number of that rotation.

        Returns:
            What the CPU did for those that no earlier call waited for; None if there were none.

        Raises:
            StepError: CPU attention failed or was overdue; all rotations are void.
        """

    def abandon_step(self, reason: str) -> None:
        """Give up what was begun: release everything that waits, on either side.

        Rotations are void and left afterwards; a step with other host-resident rows is to be ended.
        """

    def embed(
        self, batch: Batch, table: torch.Tensor, residual: torch.Tensor, norm: NextNorm
    ) -> NormedRows:
        """Write the embeddings of a batch's tokens to `residual`, `[T, H]`; return their norm."""

    def greedy_tokens(
        self, logits: torch.Tensor, token_ids: torch.Tensor, on_host: SlottedTokens
    ) -> None:
        """Write the first likeliest token of each row to `token_ids`, `[L]`, and to the host."""

    def linear(
        self, x: NormedRows, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `x @ weight.T + bias`: `[T, N]` for a weight of `[N, K]`."""

    def gated_linear(
        self, x: NormedRows, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `silu(gate) * up` of a fused projection `[2 * I, K]`, gate first: `[T, I]`."""

    def linear_add_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        norm: NextNorm,
    ) -> NormedRows:
        """Add `x @ weight.T + bias` to `residual` in place and return the norm of the sum."""

    def start_attention(
        self,
        lane: int,
        layer: int,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        norms: LayerNorms | None,
        num_visitors: int = 0,
    ) -> torch.Tensor:
        """Normalise and rotate heads, store K and V, attend causally to all of each request.

        Rows of host-resident decodes are handed to the CPU and stay open until
        `finish_attention`; all others are done.

        Args:
            lane: Which batch of the step.
            layer: Whose cache to use.
            qkv: `[T, (num_q_heads + 2 * num_kv_heads) * head_dim]`; may be overwritten.
            cos_sin: `[positions, head_dim]`, float32, see `RopeConfig.cos_sin_cache`.
            norms: Norms on the heads of Q and K, for models that have them.
            num_visitors: Further rows of the result, which `arrive` fills.

        Returns:
            `[T + num_visitors, num_q_heads * head_dim]`, in the dtype of `qkv`.
        """

    def finish_attention(self, lane: int, layer: int, out: torch.Tensor) -> None:
        """Fill the rows of host-resident decodes in what `start_attention` returned."""

    def depart(
        self,
        layer: int,
        qkv: torch.Tensor,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        norms: LayerNorms | None,
    ) -> None:
        """Rotate heads, hand a layer's rotating rows to the CPU and keep their residual stream.

        Called for every layer in turn, also without rows: the CPU is told segment by segment. The
        step has one lane.

        Args:
            layer: Whose cache to use.
            qkv: `[n, (num_q_heads + 2 * num_kv_heads) * head_dim]`; may be overwritten.
            residual: `[n, H]`, where the rows stand before the layer's attention.
            cos_sin: See `start_attention`.
            norms: See `start_attention`.
        """

    def arrive(self, layer: int, out: torch.Tensor, residual: torch.Tensor) -> None:
        """Fill in the CPU's attention of a layer, computed since the last step with rotating rows.

        Args:
            layer: At which the rows departed in that step.
            out: `[n, num_q_heads * head_dim]`, n > 0.
            residual: `[n, H]`, to be filled with what was kept of these rows.

        Raises:
            StepError: CPU attention failed, and the device knows already.
        """

    def close(self) -> None:
        """Release threads and memory; the backend is unusable afterwards."""
