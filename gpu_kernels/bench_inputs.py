"""Inputs of the benchmarks and of the tuner: random data, shuffled blocks, several buffer sets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_kernels.decode_attention import paged_decode_attention
from gpu_kernels.merge_splits import paged_decode_workspace_size
from gpu_kernels.prefill_attention import paged_prefill_attention
from gpu_kernels.tiles import MAX_SPLITS, DecodeTiles, PrefillTiles
from gpu_kernels.timing import Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of an attention benchmark; the defaults are Llama-3-8B's."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of K and V of one layer."""
        return 2 * num_tokens * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedInputs:
    """One layer's pool with shuffled block tables, and queries."""

    heads: Heads
    seq_len: int
    q: torch.Tensor
    out: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    workspace: torch.Tensor
    counters: torch.Tensor

    def decode(self, num_splits: int | None = None, tiles: DecodeTiles | None = None) -> Launch:
        """A launch of decode attention over these inputs."""
        return lambda: paged_decode_attention(
            self.out, self.q, self.k_cache, self.v_cache, self.block_tables, self.seq_lens,
            self.heads.head_dim**-0.5, max_seq_len=self.seq_len, num_splits=num_splits,
            workspace=self.workspace, counters=self.counters, tiles=tiles,
        )  # fmt: skip

    def prefill(self, tiles: PrefillTiles | None = None) -> Launch:
        """A launch of prefill attention over these inputs."""
        return lambda: paged_prefill_attention(
            self.out, self.q, self.k_cache, self.v_cache, self.block_tables, self.cu_seqlens_q,
            self.seq_lens, self.heads.head_dim**-0.5, tiles=tiles,
        )  # fmt: skip


def make_paged_inputs(
    heads: Heads, num_seqs: int, seq_len: int, num_new: int, device: torch.device
) -> PagedInputs:
    """Builds a batch of equal sequences.

    Args:
        heads: Head counts, sizes and dtype.
        num_seqs: Sequences.
        seq_len: Tokens of each, new ones included.
        num_new: New tokens of each; 1 for decode.
        device: A CUDA device.
    """
    blocks_per_seq = -(-seq_len // heads.block_size)
    num_blocks = num_seqs * blocks_per_seq
    pool = (num_blocks, heads.num_kv_heads, heads.block_size, heads.head_dim)
    order = torch.randperm(num_blocks, device=device, dtype=torch.int32)
    rows = (num_seqs * num_new, heads.num_q_heads, heads.head_dim)
    q = torch.randn(rows, dtype=heads.dtype, device=device)
    size = 1
    if num_new == 1:
        size = paged_decode_workspace_size(num_seqs, rows[1], rows[2], MAX_SPLITS)
    starts = torch.arange(num_seqs + 1, device=device, dtype=torch.int32) * num_new
    return PagedInputs(
        heads=heads,
        seq_len=seq_len,
        q=q,
        out=torch.empty_like(q),
        k_cache=torch.randn(pool, dtype=heads.dtype, device=device),
        v_cache=torch.randn(pool, dtype=heads.dtype, device=device),
        block_tables=order.view(num_seqs, blocks_per_seq),
        seq_lens=torch.full((num_seqs,), seq_len, dtype=torch.int32, device=device),
        cu_seqlens_q=starts,
        workspace=torch.empty(size, dtype=torch.float32, device=device),
        counters=torch.zeros(num_seqs * heads.num_kv_heads, dtype=torch.int32, device=device),
    )


def decode_input_sets(
    heads: Heads, num_seqs: int, seq_len: int, device: torch.device
) -> Sequence[PagedInputs]:
    """Enough decode batches that together they hold at least 256 MiB and two sets."""
    count = max(2, -(-(256 << 20) // heads.kv_bytes(num_seqs * seq_len)))
    return [make_paged_inputs(heads, num_seqs, seq_len, 1, device) for _ in range(min(count, 64))]


def causal_flops(heads: Heads, num_seqs: int, seq_len: int, num_new: int) -> float:
    """Multiplications and additions of causal attention of the last num_new tokens."""
    pairs = num_new * (seq_len - num_new) + num_new * (num_new + 1) / 2
    return 4.0 * num_seqs * pairs * heads.num_q_heads * heads.head_dim
