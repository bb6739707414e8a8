"""A CUDA GPU plays the device: cuBLAS through torch for linear layers, Triton for the rest."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.errors import KernelBuildError
from cpu_kernels.topology import keep_off
from engine.backends.base import (
    AttentionShape,
    HostPoolSize,
    HostStepTimes,
    LayerNorms,
    NextNorm,
    NormedRows,
    SlottedTokens,
)
from engine.backends.channels import PinnedBuffers
from engine.backends.cuda_staging import Staging
from engine.backends.cuda_swaps import Swaps
from engine.backends.handover import DeviceHandover
from engine.backends.host_attention import HostAttention
from engine.backends.marks import StreamMark
from engine.batch import Batch, HostWork, PagedRows, host_work_of
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.paths import cache_dir
from gpu_kernels.decode_attention import paged_decode_attention
from gpu_kernels.embedding import embed_rows
from gpu_kernels.greedy import greedy_tokens
from gpu_kernels.linear import LinearLayers
from gpu_kernels.pcie_attention import host_pool_attention
from gpu_kernels.prefill_attention import paged_prefill_attention
from gpu_kernels.rope_store import rope_store_kv
from gpu_kernels.rotating_rows import depart_rows, rejoin_rows
from gpu_kernels.tiles import decode_num_splits, num_multiprocessors
from gpu_kernels.warmup import ModelShape, precompile

_MERGED_ROWS = 256
"""Decodes of a step, at most, whose splits are merged as they finish; more hardly have any."""
_ROOM_BESIDE_PROMPTS = 4
"""Multiprocessors for what runs beside linear layers of steps with prompts: as many as the programs
that copy these to the host take, and some more. With 12, cuBLAS leaves enough for prefixes and for
attention over PCIe, too, but takes clusters of eight, which one copy keeps waiting: then steps of
240 and 496 prompt tokens of Llama-2-7B take an H200 7.1 and 13.2 ms instead of 6.6 and 11.0, beside
attention over PCIe 8.4 and 14.7 instead of 7.9 and 12.5."""
_LEAST_PER_ROOM = 10
"""On a GPU with fewer of them, copies get a tenth at most."""
_NUM_COUNTERS = 2**16
"""More than such decodes have KV heads together, and than a step samples tokens."""


class CudaBackend:
    """`Backend` on one GPU. The device pool is token-major: `[block, head, token, element]`.

    Args:
        device: The GPU.
        num_threads: CPU attention threads; None is all cores but one.
    """

    def __init__(self, device: torch.device, num_threads: int | None = None) -> None:
        self.device = device
        self._num_threads = num_threads
        self._linear = LinearLayers(device)
        self._shape: AttentionShape | None = None
        self._k_cache = self._v_cache = torch.empty(0)
        self._kernels: CpuAttention | None = None
        self._cpus_before: set[int] | None = None
        self._host: HostAttention | None = None
        self._staging: Staging | None = None
        self._swaps: Swaps | None = None
        # Of kernels that run one after the other, and leave them as they find them.
        self._counters = torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)
        self._prefill_stream = torch.cuda.Stream(device)
        self._batches: Sequence[Batch] = ()
        # Rows of host-resident decodes are rotated like all others but stored by the CPU.
        self._no_slots = torch.empty(0, dtype=torch.int64)

    @property
    def description(self) -> str:
        """What computes what, for people."""
        name = torch.cuda.get_device_name(self.device)
        host = ""
        if self._kernels is not None:
            host = f"; offloaded attention by ISPC kernels with {self._kernels.num_threads} threads"
        return f"linear layers by cuBLAS and Triton, attention by Triton, on {name}{host}"

    @property
    def num_attention_threads(self) -> int:
        """Threads of CPU attention, 0 without a host pool."""
        return self._kernels.num_threads if self._kernels is not None else 0

    @property
    def runs_behind(self) -> bool:
        """Whether the host can go ahead; see `Backend`."""
        return True

    def mark(self) -> StreamMark:
        """Mark the point after all work launched so far; see `Backend`."""
        return StreamMark(self.device)

    def num_decode_splits(self, num_seqs: int, max_seq_len: int) -> int:
        """Return the splits of decode attention; see `Backend`."""
        num_kv_heads = self._checked_shape().num_kv_heads
        sms = num_multiprocessors(self.device)
        return decode_num_splits(num_seqs, num_kv_heads, max_seq_len, sms)

    def prepare(self, config: ModelConfig, shape: AttentionShape) -> int:
        """Compile the model's kernels, or load them from Triton's cache."""
        with torch.cuda.device(self.device):
            compiled = precompile(
                ModelShape(
                    num_q_heads=shape.num_q_heads,
                    num_kv_heads=shape.num_kv_heads,
                    head_dim=shape.head_dim,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    vocab_size=config.vocab_size,
                    block_size=shape.block_size,
                    dtype=shape.dtype,
                    has_qk_norm=config.qk_norm,
                    has_qkv_bias=config.qkv_bias,
                    has_out_bias=config.out_bias,
                    has_mlp_bias=config.mlp_bias,
                ),
                self.device,
            )
        return len(compiled)

    def allocate_kv_cache(
        self, shape: AttentionShape, num_blocks: int, host: HostPoolSize | None = None
    ) -> None:
        """Make the pools; see `Backend`."""
        # Dropped first: the pool of the memory probe and the real one must not exist together.
        self._k_cache = self._v_cache = torch.empty(0)
        size = (
            shape.num_layers,
            num_blocks,
            shape.num_kv_heads,
            shape.block_size,
            shape.head_dim,
        )
        self._k_cache = torch.zeros(size, dtype=shape.dtype, device=self.device)
        self._v_cache = torch.zeros(size, dtype=shape.dtype, device=self.device)
        self._shape = shape
        if host is not None:
            self._make_host(shape, host)

    def _make_host(self, shape: AttentionShape, size: HostPoolSize) -> None:
        try:
            self._kernels = CpuAttention(cache_dir(), self._num_threads)
        except KernelBuildError as error:
            raise ConfigError(f"{error}, or use --mode gpu-only") from error
        self._cpus_before = keep_off(self._kernels.cpus)
        self._host = HostAttention(
            self._kernels, shape, size, self.device, self._attend_directly, self._make_channels
        )
        self._staging = Staging(shape, self._host, self.device)
        self._swaps = Swaps(self._k_cache, self._v_cache, self._host)
        self._no_slots = torch.full((size.max_rows,), -1, dtype=torch.int64, device=self.device)

    def _make_channels(
        self, buffers: PinnedBuffers, num_channels: int, limit_s: float
    ) -> DeviceHandover:
        return DeviceHandover(buffers, num_channels, self.device, limit_s)

    def _attend_directly(
        self, answers: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor, blocks: torch.Tensor
    ) -> None:
        host, scale = self._checked_host(), self._checked_shape().softmax_scale
        pools = host.k_pool.flatten(0, 1), host.v_pool.flatten(0, 1)
        host_pool_attention(answers, rows, entries, blocks, *pools, scale)

    def swap_out(self, device_blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy blocks to the host pool, under the step's compute; see `Backend`."""
        self._checked_swaps().start(device_blocks, host_blocks, to_host=True)

    def swap_in(
        self, device_blocks: Sequence[int], host_blocks: Sequence[int], *, beside: bool = False
    ) -> None:
        """Copy blocks from the host pool, under the step's compute; see `Backend`."""
        if beside:
            self._checked_swaps().start_arrivals(device_blocks, host_blocks)
        else:
            self._checked_swaps().start(device_blocks, host_blocks, to_host=False)

    def join_arrivals(self) -> None:
        """Let later work wait for blocks that come in beside a step; see `Backend`."""
        if self._swaps is not None:
            self._swaps.join_arrivals()

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Announce a step and begin it; see `Backend`."""
        self.announce(batches)
        self.begin_host(host_work_of(batches))

    def announce(self, batches: Sequence[Batch]) -> None:
        """Say what the calls that follow are about; see `Backend`."""
        self._batches = batches
        self._linear.room = self._room
        if self._host is not None:
            self._host.announce(batches)

    @property
    def _room(self) -> int:
        """Multiprocessors that linear layers are to leave to what runs beside them."""
        for batch in self._batches:
            rotates_beside = batch.rotating is not None and batch.device_rows.has_prefills
            if rotates_beside or batch.host_prefills is not None:
                return min(
                    _ROOM_BESIDE_PROMPTS, num_multiprocessors(self.device) // _LEAST_PER_ROOM
                )
        return 0

    def reserve_staging(self, lane: int, num_blocks: int) -> None:
        """Make staging blocks that graphs can use; see `Backend`."""
        assert self._staging is not None, "there is no host pool"
        self._staging.reserve(lane, num_blocks)

    def reserve_rotation(self, num_segments: int) -> None:
        """Make what rotating rows are handed over with; see `Backend`."""
        self._checked_host().reserve_rotation(num_segments)

    def begin_host(self, work: HostWork) -> None:
        """Give the CPU its part; see `Backend`."""
        if self._host is not None:
            self._host.begin_step(work)

    def join_copies(self) -> None:
        """Let later work wait for the step's copies; see `Backend`."""
        if self._staging is not None:
            self._staging.join()
        if self._swaps is not None:
            self._swaps.join()
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
        """Give up the step and wait until the GPU has left it; see `Backend`."""
        if self._host is not None:
            self._host.abandon_step(reason)
            torch.cuda.synchronize(self.device)
            self._host.forget_rotations()
        if self._staging is not None:
            self._staging.forget()

    def embed(
        self, batch: Batch, table: torch.Tensor, residual: torch.Tensor, norm: NextNorm
    ) -> NormedRows:
        """Look tokens up and normalise; see `Backend`."""
        out = torch.empty_like(residual)
        ids = batch.input_ids
        sampled = ids if batch.sampled is None else batch.sampled
        embed_rows(out, residual, ids, batch.sources, sampled, table, norm.weight, norm.eps)
        return NormedRows(out)

    def greedy_tokens(
        self, logits: torch.Tensor, token_ids: torch.Tensor, on_host: SlottedTokens
    ) -> None:
        """Pick the likeliest tokens; see `Backend`."""
        greedy_tokens(token_ids, on_host.token_ids, on_host.slot, logits, self._counters)

    def linear(
        self, x: NormedRows, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return a linear layer's output; see `Backend`."""
        return self._linear.linear(x.rows, weight, bias, x.lacking)

    def gated_linear(
        self, x: NormedRows, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the gated activation of a fused projection; see `Backend`."""
        return self._linear.gated_linear(x.rows, weight, bias, x.lacking)

    def linear_add_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        norm: NextNorm,
    ) -> NormedRows:
        """Add in place and normalise, or leave that to the reader; see `Backend`."""
        following = (norm.weight, norm.eps, norm.reader)
        return NormedRows(*self._linear.linear_add_norm(x, weight, bias, residual, *following))

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
        batch, shape = self._batches[lane], self._checked_shape()
        if self._swaps is not None:
            prefills = batch.host_prefills
            is_ahead = prefills is not None and prefills.prefix is not None
            self._swaps.wait_for(min(layer + is_ahead, shape.num_layers - 1))
        out = qkv.new_empty(qkv.shape[0] + num_visitors, shape.num_q_heads, shape.head_dim)
        if batch.host_decodes is not None:
            # First, so that the CPU's work begins as early as it can.
            rows = batch.host_decode_tokens
            slots = self._no_slots[: batch.host_decodes.num_seqs]
            caches = (self._k_cache[layer], self._v_cache[layer])
            positions = batch.positions[rows]
            self._rope_store(qkv[rows], positions, slots, cos_sin, norms, *caches)
            self._checked_host().send(lane, layer, qkv[rows])
        device = batch.device_rows
        caches = (self._k_cache[layer], self._v_cache[layer])
        if device.num_tokens:
            rows = slice(0, device.num_tokens)
            positions, slots = batch.positions[rows], device.slot_mapping
            self._rope_store(qkv[rows], positions, slots, cos_sin, norms, *caches)
        if not self._forks(batch):
            self._attend_decodes(qkv, out, *caches, device)
            self._prefill(lane, layer, qkv, out, cos_sin, norms)
            return out.flatten(1)
        # Decodes wait for memory, prefills for arithmetic.
        stream = torch.cuda.current_stream(self.device)
        self._prefill_stream.wait_stream(stream)
        with torch.cuda.stream(self._prefill_stream):
            self._prefill(lane, layer, qkv, out, cos_sin, norms)
        self._attend_decodes(qkv, out, *caches, device)
        stream.wait_stream(self._prefill_stream)
        return out.flatten(1)

    def _forks(self, batch: Batch) -> bool:
        """Return whether prefill attention runs beside decode attention.

        In graphs only: elsewhere, launching is what takes time.
        """
        has_prefills = batch.device_rows.has_prefills or batch.host_prefills is not None
        both = has_prefills and batch.device_rows.num_decodes > 0
        return both and torch.cuda.is_current_stream_capturing()

    def _prefill(
        self,
        lane: int,
        layer: int,
        qkv: torch.Tensor,
        out: torch.Tensor,
        cos_sin: torch.Tensor,
        norms: LayerNorms | None,
    ) -> None:
        """Attend prompts; those that go to the host are rotated and copied, too."""
        batch = self._batches[lane]
        if batch.device_rows.has_prefills:
            rows = slice(0, batch.device_rows.num_tokens)
            caches = (self._k_cache[layer], self._v_cache[layer])
            self._attend_prefills(rows, qkv, out, *caches, batch.device_rows)
        if batch.host_prefills is not None:
            assert self._staging is not None, "there is no host pool"
            rows, prefills = batch.host_prefill_tokens, batch.host_prefills
            caches = self._staging.begin_layer(lane, layer, prefills)
            positions, slots = batch.positions[rows], prefills.rows.slot_mapping
            self._rope_store(qkv[rows], positions, slots, cos_sin, norms, *caches)
            self._staging.end_layer(lane, layer, prefills)
            self._attend_prefills(rows, qkv, out, *caches, prefills.rows)

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
        rotating, shape = self._checked_host().rotating, self._checked_shape()
        if self._swaps is not None:
            self._swaps.wait_for(layer)
        rotating.begin_layer(layer)
        if qkv.shape[0]:
            rows, sent = rotating.rows, rotating.sent(layer)
            departing = rows.departing(layer)
            assert sent is not None, "channels take all rows, also those to spare"
            depart_rows(
                sent,
                rows.residuals,
                qkv,
                residual,
                rows.positions[departing],
                rows.slots[departing],
                cos_sin,
                num_q_heads=shape.num_q_heads,
                num_kv_heads=shape.num_kv_heads,
                **_norm_options(norms),
            )
        rotating.ring(layer)

    def arrive(self, layer: int, out: torch.Tensor, residual: torch.Tensor) -> None:
        """Take the CPU's answers; see `Backend`."""
        rotating = self._checked_host().rotating
        rows, arriving = rotating.rows, rotating.rows.arriving(layer)
        answers, answer_ids = rotating.answers(layer), rows.answers[arriving]
        rejoin_rows(out, residual, answers, answer_ids, rows.residuals, rows.slots[arriving])

    def _checked_shape(self) -> AttentionShape:
        assert self._shape is not None, "allocate_kv_cache comes first"
        return self._shape

    def _checked_swaps(self) -> Swaps:
        assert self._swaps is not None, "there is no host pool"
        return self._swaps

    def _checked_host(self) -> HostAttention:
        assert self._host is not None, "there is no host pool"
        return self._host

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = self._checked_shape()
        heads = [shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads]
        q, k, v = qkv.view(qkv.shape[0], -1, shape.head_dim).split(heads, dim=1)
        return q, k, v

    def _rope_store(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        cos_sin: torch.Tensor,
        norms: LayerNorms | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> None:
        """Normalise and rotate rows in place and store their K and V."""
        q, k, v = self._heads(qkv)
        rope_store_kv(
            q,
            k,
            v,
            positions,
            cos_sin,
            k_cache,
            v_cache,
            slots,
            **_norm_options(norms),
        )

    def _attend_decodes(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        rows: PagedRows,
    ) -> None:
        """Attend decodes of device-resident requests."""
        count = rows.num_decodes
        if count:
            paged_decode_attention(
                out[:count],
                self._heads(qkv[:count])[0],
                k_cache,
                v_cache,
                rows.block_tables[:count],
                rows.seq_lens[:count],
                self._checked_shape().softmax_scale,
                max_seq_len=rows.max_decode_len,
                num_splits=rows.num_splits,
                counters=self._counters if count <= _MERGED_ROWS else None,
            )

    def _attend_prefills(
        self,
        tokens: slice,
        qkv: torch.Tensor,
        out: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        rows: PagedRows,
    ) -> None:
        """Attend prompts whose K and V are in a pool on the device, decodes among them or not."""
        paged_prefill_attention(
            out[tokens],
            self._heads(qkv[tokens])[0],
            k_cache,
            v_cache,
            rows.block_tables[rows.num_decodes :],
            rows.prefill_cu_seqlens_q,
            rows.seq_lens[rows.num_decodes :],
            self._checked_shape().softmax_scale,
        )

    def close(self) -> None:
        """Free the pools and stop the attention threads."""
        self._k_cache = self._v_cache = torch.empty(0)
        if self._host is not None:
            torch.cuda.synchronize(self.device)
            self._host.close()
        if self._kernels is not None:
            self._kernels.close()
        if self._cpus_before is not None:
            os.sched_setaffinity(0, self._cpus_before)
            self._cpus_before = None
        self._host = self._kernels = self._staging = self._swaps = None


def _norm_options(norms: LayerNorms | None) -> dict[str, Any]:
    """Return the options of kernels that rotate, for models with norms on the heads."""
    if norms is None:
        return {}
    return {"q_norm_weight": norms.q, "k_norm_weight": norms.k, "norm_eps": norms.eps}
