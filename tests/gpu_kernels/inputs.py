"""Random inputs shared by the kernel tests: a shuffled pool full of NaN where nothing is stored."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """A batch of sequences in a shuffled pool; k_seqs and v_seqs hold the same K and V densely."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    k_seqs: list[torch.Tensor]
    v_seqs: list[torch.Tensor]


def make_paged_batch(
    seq_lens: list[int],
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> PagedBatch:
    """Stores random K and V at shuffled blocks; every other element of the pool is NaN."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-seq_len // block_size) for seq_len in seq_lens]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    caches = [torch.full(shape, float("nan")) for _ in range(2)]
    seqs: list[list[torch.Tensor]] = [[], []]
    tables = torch.full((len(seq_lens), max([*counts, 1]) + 2), 2**30, dtype=torch.int32)
    for row, (seq_len, count) in enumerate(zip(seq_lens, counts, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        for cache, dense in zip(caches, seqs, strict=True):
            values = torch.randn(seq_len, num_kv_heads, head_dim, generator=generator)
            dense.append(values.to(dtype).to(device))
            for index, block in enumerate(blocks):
                part = values[index * block_size : (index + 1) * block_size]
                cache[block, :, : len(part)] = part.transpose(0, 1)
    return PagedBatch(
        k_cache=caches[0].to(dtype).to(device),
        v_cache=caches[1].to(dtype).to(device),
        block_tables=tables.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        k_seqs=seqs[0],
        v_seqs=seqs[1],
    )


def random_rows(
    num_rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: str, seed: int = 1
) -> torch.Tensor:
    """Random [num_rows, heads, head_dim] that is a strided view, as a slice of a fused QKV is."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(num_rows, (heads + 2) * head_dim, generator=generator).to(dtype).to(device)
    return wide[:, head_dim : (heads + 1) * head_dim].view(num_rows, heads, head_dim)


def cos_sin_cache(max_position: int, rotary_dim: int, device: str) -> torch.Tensor:
    """The usual table [max_position, rotary_dim]: cosines, then sines, float32."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
