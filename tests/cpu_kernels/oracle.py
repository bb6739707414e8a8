"""Slow, obvious attention and cache copies in float32, independent of the kernels.

Works on plain token-major rows; `fill_cache` alone knows the host layout, written out from its
definition element by element.
"""

from dataclasses import dataclass

import torch

from cpu_kernels.checks import host_kv_shapes


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """q [num_q_heads, head_dim], k and v [seq_len, num_kv_heads, head_dim]; in q's own dtype."""
    group = q.shape[0] // k.shape[1]
    out = torch.zeros_like(q)
    for head in range(q.shape[0]):
        scores = (k[:, head // group] @ q[head]) * softmax_scale
        out[head] = torch.softmax(scores, dim=0) @ v[:, head // group]
    return out


@dataclass
class Case:
    """One layer's cache, filled at scattered blocks, NaN elsewhere, and what lies in it."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    k_rows: list[torch.Tensor]
    v_rows: list[torch.Tensor]
    scale: float

    def expected(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The output, computed in `dtype` throughout."""
        out = torch.zeros_like(self.q, dtype=dtype)
        for seq, (k, v) in enumerate(zip(self.k_rows, self.v_rows, strict=True)):
            if len(k):
                q = self.q[seq].to(dtype)
                out[seq] = attend(q, k.to(dtype), v.to(dtype), self.scale)
        return out


def fill_cache(case: Case, seq: int, first: int, last: int) -> None:
    """Write tokens [first, last) of one request, one by one."""
    block_size = case.k_cache.shape[3]
    for token in range(first, last):
        block = case.block_tables[seq, token // block_size]
        offset = token % block_size
        case.k_cache[block, :, :, offset] = case.k_rows[seq][token]
        case.v_cache[block, :, offset, :] = case.v_rows[seq][token]


def make_case(
    seq_lens: list[int],
    *,
    group: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 128,
    block_size: int = 16,
    cache_dtype: torch.dtype = torch.bfloat16,
    io_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random queries and tokens in shuffled blocks; every unused element is NaN."""
    generator = torch.Generator().manual_seed(seed)
    max_blocks = max([1, *(-(-seq_len // block_size) for seq_len in seq_lens)])
    num_blocks = len(seq_lens) * max_blocks + 3
    k_shape, v_shape = host_kv_shapes(num_blocks, num_kv_heads, head_dim, block_size)
    blocks = torch.randperm(num_blocks, generator=generator)[: len(seq_lens) * max_blocks]
    row_shape = (num_kv_heads, head_dim)
    rows = [
        [torch.randn(n, *row_shape, generator=generator).to(cache_dtype) for n in seq_lens]
        for _ in "kv"
    ]
    q = torch.randn(len(seq_lens), group * num_kv_heads, head_dim, generator=generator)
    case = Case(
        q=q.to(io_dtype),
        k_cache=torch.full(k_shape, torch.nan, dtype=cache_dtype),
        v_cache=torch.full(v_shape, torch.nan, dtype=cache_dtype),
        block_tables=blocks.to(torch.int32).view(len(seq_lens), max_blocks),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        k_rows=rows[0],
        v_rows=rows[1],
        scale=head_dim**-0.5,
    )
    for seq, seq_len in enumerate(seq_lens):
        fill_cache(case, seq, 0, seq_len)
        # What a table says past a request's end must not matter.
        case.block_tables[seq, -(-seq_len // block_size) :] = -1
    return case
