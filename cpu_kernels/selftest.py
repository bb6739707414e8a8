"""A numeric self-test of the built kernels, for `neo build-kernels --check`.

Seconds, not minutes: every head size, group size, block size and cache type at least once, against
plain float32 torch on the same rounded inputs. The full tests are in the repository's test folder.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.checks import BLOCK_SIZES, HEAD_DIMS, host_kv_shapes

GROUPS = (1, 4, 8, 3, 16, 7, 2)
CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SEQ_LENS = (1, 0, 65, 700, 512)
NUM_KV_HEADS = 2
# Both sides accumulate in float32 over the same values: only the order of additions differs.
TOLERANCE = 2e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestResult:
    """One shape's outcome."""

    head_dim: int
    group: int
    block_size: int
    cache_dtype: str
    max_error: float
    passed: bool


def run_selftest(cache_dir: Path, num_threads: int | None = None) -> list[SelfTestResult]:
    """Run the built kernels over a spread of shapes.

    Returns:
        One result a shape; all have passed if the kernels are sound.

    Raises:
        KernelBuildError: The kernels are not built.
    """
    groups, blocks = itertools.cycle(GROUPS), itertools.cycle(BLOCK_SIZES)
    with CpuAttention(cache_dir, num_threads) as attention:
        return [
            _check(attention, head_dim, next(groups), next(blocks), dtype)
            for head_dim, dtype in itertools.product(HEAD_DIMS, CACHE_DTYPES)
        ]


def _check(
    attention: CpuAttention, head_dim: int, group: int, block_size: int, dtype: torch.dtype
) -> SelfTestResult:
    """Store random tokens, attend to them, compare."""
    generator = torch.Generator().manual_seed(head_dim * 100 + group)
    num_seqs, max_blocks = len(SEQ_LENS), -(-max(SEQ_LENS) // block_size)
    k_shape, v_shape = host_kv_shapes(num_seqs * max_blocks, NUM_KV_HEADS, head_dim, block_size)
    k_cache = torch.full(k_shape, torch.nan, dtype=dtype)
    v_cache = torch.full(v_shape, torch.nan, dtype=dtype)
    blocks = torch.randperm(num_seqs * max_blocks, generator=generator, dtype=torch.int32)
    tables = blocks.view(num_seqs, max_blocks)
    q = torch.randn(num_seqs, NUM_KV_HEADS * group, head_dim, generator=generator)
    out = torch.empty_like(q)
    expected = torch.zeros_like(q)
    for seq, seq_len in enumerate(SEQ_LENS):
        k, v = torch.randn(2, seq_len, NUM_KV_HEADS, head_dim, generator=generator).to(dtype)
        position = torch.arange(seq_len)
        slots = tables[seq, position // block_size].long() * block_size + position % block_size
        attention.store_kv(k, v, k_cache, v_cache, slots)
        if seq_len:
            expected[seq] = _attend(q[seq], k.float(), v.float(), group)
    seq_lens = torch.tensor(SEQ_LENS, dtype=torch.int32)
    scale = head_dim**-0.5
    attention.paged_decode_attention(out, q, k_cache, v_cache, tables, seq_lens, scale)
    error = (out - expected).abs().max().item()
    return SelfTestResult(
        head_dim=head_dim,
        group=group,
        block_size=block_size,
        cache_dtype=str(dtype).removeprefix("torch."),
        max_error=error,
        passed=error <= TOLERANCE,
    )


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int) -> torch.Tensor:
    """Plain attention of one query row `[heads, head_dim]` to `[tokens, kv_heads, head_dim]`."""
    k, v = (rows.repeat_interleave(group, dim=1).transpose(0, 1) for rows in (k, v))
    scores = torch.einsum("hd,htd->ht", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("ht,htd->hd", scores.softmax(dim=-1), v)
