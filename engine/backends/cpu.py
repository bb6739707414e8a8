"""The CPU plays the device: torch for everything but decode attention, which is NEO's own kernel.

Both pools have the host layout here, because the processor that reads them is the CPU.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from cpu_kernels.attention import CpuAttention
from cpu_kernels.checks import host_kv_shapes
from cpu_kernels.errors import KernelBuildError
from engine.backends.base import (
    AttentionShape,
    HostPoolSize,
    HostStepTimes,
    LayerNorms,
    NextNorm,
    NormedRows,
    SlottedTokens,
)
from engine.backends.host_attention import HostAttention
from engine.backends.marks import ClockMark
from engine.batch import Batch, HostWork, PagedRows, host_work_of
from engine.errors import CapacityError, ConfigError
from engine.host_memory import allocate_host_tensor
from engine.model_config import ModelConfig
from engine.paths import cache_dir


class CpuBackend:
    """`Backend` on the host's processor.

    Args:
        num_threads: Attention threads; None is all cores but one.

    Raises:
        ConfigError: The CPU kernels are not built.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self.device = torch.device("cpu")
        try:
            self._kernels = CpuAttention(cache_dir(), num_threads)
        except KernelBuildError as error:
            raise ConfigError(str(error)) from error
        self._shape: AttentionShape | None = None
        self._k_cache = self._v_cache = torch.empty(0)
        self._host: HostAttention | None = None
        self._batches: Sequence[Batch] = ()

    @property
    def description(self) -> str:
        """What computes what, for people."""
        return (
            f"linear layers by torch with {torch.get_num_threads()} threads, "
            f"decode attention by ISPC kernels with {self._kernels.num_threads}"
        )

    @property
    def num_attention_threads(self) -> int:
        """Threads of CPU attention."""
        return self._kernels.num_threads

    @property
    def runs_behind(self) -> bool:
        """False: calls compute at once."""
        return False

    def mark(self) -> ClockMark:
        """Mark this moment; see `Backend`."""
        return ClockMark()

    def num_decode_splits(self, num_seqs: int, max_seq_len: int) -> int:
        """Return 1: the CPU kernels cut requests by themselves."""
        return 1

    def prepare(self, config: ModelConfig, shape: AttentionShape) -> int:
        """Nothing to do: the kernels are built ahead of time for every model."""
        return 0

    def allocate_kv_cache(
        self, shape: AttentionShape, num_blocks: int, host: HostPoolSize | None = None
    ) -> None:
        """Make the pools; see `Backend`."""
        k_shape, v_shape = host_kv_shapes(
            num_blocks, shape.num_kv_heads, shape.head_dim, shape.block_size
        )
        try:
            self._k_cache = allocate_host_tensor((shape.num_layers, *k_shape), shape.dtype)
            self._v_cache = allocate_host_tensor((shape.num_layers, *v_shape), shape.dtype)
        except (OSError, RuntimeError) as error:
            raise CapacityError(
                f"cannot allocate {num_blocks * shape.block_bytes / 2**30:.1f} GiB of KV cache; "
                "lower --host-kv-gb or --device-kv-blocks"
            ) from error
        self._shape = shape
        if host is not None:
            self._host = HostAttention(
                self._kernels, shape, host, self.device, self._attend_directly
            )

    def _attend_directly(
        self, answers: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor, blocks: torch.Tensor
    ) -> None:
        """Attend one row after the other; its new K and V are stored a second time."""
        shape, host = self._checked_shape(), self._checked_host()
        heads = [shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads]
        pools = host.k_pool.flatten(0, 1), host.v_pool.flatten(0, 1)
        for row, answer, length, first in entries.T.tolist():
            if length == 0:
                continue
            q, k, v = rows[row].view(1, -1, shape.head_dim).split(heads, dim=1)
            table = blocks[None, first : first + -(-length // shape.block_size)]
            out = answers[answer].view(1, -1, shape.head_dim)
            lens = torch.tensor([length], dtype=torch.int32)
            self._kernels.paged_decode_attention(
                out, q, *pools, table, lens, shape.softmax_scale, k=k, v=v
            )

    def swap_out(self, device_blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy blocks to the host pool; see `Backend`."""
        host = self._checked_host()
        host.k_pool[:, host_blocks] = self._k_cache[:, device_blocks]
        host.v_pool[:, host_blocks] = self._v_cache[:, device_blocks]

    def swap_in(
        self, device_blocks: Sequence[int], host_blocks: Sequence[int], *, beside: bool = False
    ) -> None:
        """Copy blocks from the host pool, at once; see `Backend`."""
        host = self._checked_host()
        self._k_cache[:, device_blocks] = host.k_pool[:, host_blocks]
        self._v_cache[:, device_blocks] = host.v_pool[:, host_blocks]

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Announce a step and begin it; see `Backend`."""
        self.announce(batches)
        self.begin_host(host_work_of(batches))

    def announce(self, batches: Sequence[Batch]) -> None:
        """Say what the calls that follow are about; see `Backend`."""
        self._batches = batches
        if self._host is not None:
            self._host.announce(batches)

    def reserve_staging(self, lane: int, num_blocks: int) -> None:
        """Nothing to do: prompts are attended to in the host pool."""

    def reserve_rotation(self, num_segments: int) -> None:
        """Nothing to do: it is made when it is first needed."""

    def begin_host(self, work: HostWork) -> None:
        """Give the CPU its part; see `Backend`."""
        if self._host is not None:
            self._host.begin_step(work)

    def join_arrivals(self) -> None:
        """Nothing to do: copies are made at once."""

    def join_copies(self) -> None:
        """Nothing is under way but what plays a GPU's second stream; see `Backend`."""
        if self._host is not None:
            self._host.join_direct()

    def end_step(self) -> HostStepTimes | None:
        """Wait for the CPU; see `Backend`."""
        return self._host.end_step() if self._host is not None else None

    @property
    def num_rotations(self) -> int:
        """Steps with rotating rows; see `Backend`."""
        return self._host.num_rotations if self._host is not None else 0

    def end_rotations(self, before: int) -> HostStepTimes | None:
        """Wait for the CPU; see `Backend`."""
        return self._host.end_rotations(before) if self._host is not None else None

    def abandon_step(self, reason: str) -> None:
        """Give up the step; see `Backend`."""
        if self._host is not None:
            self._host.abandon_step(reason)
            self._host.forget_rotations()

    def embed(
        self, batch: Batch, table: torch.Tensor, residual: torch.Tensor, norm: NextNorm
    ) -> NormedRows:
        """Look tokens up and normalise; see `Backend`."""
        ids = batch.input_ids
        if batch.sources is not None:
            assert batch.sampled is not None, "pending tokens come from the last step"
            pending = batch.sampled[batch.sources.clamp(min=0)]
            ids = torch.where(batch.sources < 0, ids, pending)
        residual.copy_(F.embedding(ids, table))
        return NormedRows(_rms_norm(residual, norm.weight, norm.eps))

    def greedy_tokens(
        self, logits: torch.Tensor, token_ids: torch.Tensor, on_host: SlottedTokens
    ) -> None:
        """Pick the likeliest tokens; see `Backend`."""
        torch.argmax(logits, dim=-1, out=token_ids)
        on_host.token_ids[int(on_host.slot), : len(token_ids)] = token_ids

    def linear(
        self, x: NormedRows, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return a linear layer's output; see `Backend`."""
        return F.linear(x.rows, weight, bias)

    def gated_linear(
        self, x: NormedRows, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the gated activation of a fused projection; see `Backend`."""
        gate, up = F.linear(x.rows, weight, bias).chunk(2, dim=-1)
        return F.silu(gate) * up

    def linear_add_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        norm: NextNorm,
    ) -> NormedRows:
        """Add in place and normalise; see `Backend`."""
        residual += F.linear(x, weight, bias)
        return NormedRows(_rms_norm(residual, norm.weight, norm.eps))

    def start_attention(
        self,
        lane: int,
        layer: int,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        norms: LayerNorms | None,
        num_visitors: int = 0,
    ) -> torch.Tensor:
        """Rotate, store and attend; see `Backend`."""
        batch = self._batches[lane]
        q, k, v = self._rotated(qkv, batch.positions[: qkv.shape[0]], cos_sin, norms)
        out = q.new_empty(q.shape[0] + num_visitors, *q.shape[1:])
        if batch.host_decodes is not None:
            rows = batch.host_decode_tokens
            handed_over = torch.cat([q[rows], k[rows], v[rows]], dim=1).flatten(1)
            self._checked_host().send(lane, layer, handed_over)
        device = slice(0, batch.device_rows.num_tokens)
        caches = (self._k_cache[layer], self._v_cache[layer])
        self._attend(out[device], q[device], k[device], v[device], *caches, batch.device_rows)
        if batch.host_prefills is not None:
            host, rows = self._checked_host(), batch.host_prefill_tokens
            caches = (host.k_pool[layer], host.v_pool[layer])
            self._attend(out[rows], q[rows], k[rows], v[rows], *caches, batch.host_prefills.rows)
        return out.flatten(1)

    def finish_attention(self, lane: int, layer: int, out: torch.Tensor) -> None:
        """Take the CPU's answer; see `Backend`."""
        batch = self._batches[lane]
        if batch.host_decodes is not None:
            self._checked_host().receive(lane, layer, out[batch.host_decode_tokens])

    def depart(
        self,
        layer: int,
        qkv: torch.Tensor,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        norms: LayerNorms | None,
    ) -> None:
        """Hand rotating rows over; see `Backend`."""
        rotating = self._checked_host().rotating
        rotating.begin_layer(layer)
        if qkv.shape[0]:
            rows, sent = rotating.rows, rotating.sent(layer)
            departing = rows.departing(layer)
            if sent is not None:
                rotated = self._rotated(qkv, rows.positions[departing], cos_sin, norms)
                torch.cat(rotated, dim=1, out=sent.view(sent.shape[0], -1, rotated[0].shape[-1]))
            rows.residuals.index_copy_(0, rows.slots[departing], residual)
        rotating.ring(layer)

    def arrive(self, layer: int, out: torch.Tensor, residual: torch.Tensor) -> None:
        """Take the CPU's answers; see `Backend`."""
        rotating = self._checked_host().rotating
        rows, arriving = rotating.rows, rotating.rows.arriving(layer)
        torch.index_select(rotating.answers(layer), 0, rows.answers[arriving], out=out)
        torch.index_select(rows.residuals, 0, rows.slots[arriving], out=residual)

    def _rotated(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        norms: LayerNorms | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return heads of Q, K and V, `[T, heads, head_dim]`, of a row or more."""
        shape = self._checked_shape()
        heads = [shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads]
        q, k, v = qkv.view(qkv.shape[0], -1, shape.head_dim).split(heads, dim=1)
        if norms is not None:
            q = _rms_norm(q, norms.q, norms.eps)
            k = _rms_norm(k, norms.k, norms.eps)
        cos, sin = cos_sin[positions].to(qkv.dtype).unsqueeze(1).chunk(2, dim=-1)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def _checked_shape(self) -> AttentionShape:
        assert self._shape is not None, "allocate_kv_cache comes first"
        return self._shape

    def _checked_host(self) -> HostAttention:
        assert self._host is not None, "there is no host pool"
        return self._host

    def _attend(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        rows: PagedRows,
    ) -> None:
        """Attend decodes by the ISPC kernel, then prefills by torch, one after the other."""
        num_decodes = rows.num_decodes
        if num_decodes:
            self._kernels.paged_decode_attention(
                out[:num_decodes],
                q[:num_decodes],
                k_cache,
                v_cache,
                rows.block_tables[:num_decodes],
                rows.seq_lens[:num_decodes],
                self._checked_shape().softmax_scale,
                k=k[:num_decodes],
                v=v[:num_decodes],
            )
        if rows.num_seqs == num_decodes:
            return
        starts = rows.prefill_cu_seqlens_q.tolist()
        first = starts[0]
        self._kernels.store_kv(k[first:], v[first:], k_cache, v_cache, rows.slot_mapping[first:])
        for row, (start, end) in enumerate(pairwise(starts), start=num_decodes):
            if start == end:
                continue
            tokens, context_len = slice(start, end), int(rows.seq_lens[row])
            keys, values = k[tokens], v[tokens]
            if context_len > end - start:
                keys, values = self._kernels.gather_kv(
                    k_cache, v_cache, rows.block_tables[row], context_len
                )
            out[tokens] = self._causal_attention(q[tokens], keys.to(q.dtype), values.to(q.dtype))

    def _causal_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend `[Lq, heads, head_dim]` to `[Lk, kv_heads, head_dim]`, aligned at their ends."""
        num_queries, num_keys = q.shape[0], k.shape[0]
        mask = None
        if num_queries < num_keys:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._checked_shape().softmax_scale,
            enable_gqa=True,
        )
        return out.squeeze(0).transpose(0, 1)

    def close(self) -> None:
        """Stop the attention threads."""
        if self._host is not None:
            self._host.close()
            self._host = None
        self._kernels.close()


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise over the last dimension and scale, in the dtype of `x`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + head_dim / 2) of each head: `[T, heads, head_dim]`."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
