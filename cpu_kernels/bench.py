"""Measure decode attention against the machine's plain read bandwidth.

Both read the same memory with the same threads, in turns, so that a noisy machine shifts both. The
ratio is what counts; the attention goal is 0.85 of the plain read.
"""

import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.checks import host_kv_shapes

HEAD_DIM = 128
BLOCK_SIZE = 16
NUM_KV_HEADS = 8
GROUPS = (1, 4, 8)
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((64, 1_000), (2, 32_000))  # requests, tokens of each
GOAL = 0.85
# Two layers of the larger shape are 0.5 GB: far beyond any last-level cache, and each round reads
# the one that was not read last.
NUM_LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Median bandwidths of one shape; `ratio` is the median of the rounds' own ratios."""

    num_threads: int
    num_requests: int
    num_tokens: int
    group: int
    kv_dtype: str
    attention_gb_s: float
    read_gb_s: float
    ratio: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's cache and the memory it lies in."""

    memory: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def run_bench(
    cache_dir: Path,
    *,
    num_threads: int | None = None,
    rounds: int = 7,
    groups: tuple[int, ...] = GROUPS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    on_progress: Callable[[str], None] = lambda message: None,
) -> list[BenchResult]:
    """Measure every combination of shape, group size and KV type.

    Args:
        cache_dir: Where `build` put the kernels.
        num_threads: As in `CpuAttention`.
        rounds: Measurements of each; the medians are returned.
        groups: Query heads a KV head.
        dtypes: Cache types; queries are of the same type.
        shapes: Pairs of (requests, tokens of each).
        on_progress: Called with a short text before each combination.

    Raises:
        KernelBuildError: The kernels are not built.
    """
    with CpuAttention(cache_dir, num_threads) as attention:
        return [
            _measure(attention, layers, shape, group, rounds)
            for shape in shapes
            for dtype in dtypes
            for layers in [_make_layers(shape, dtype)]
            for group in _announced(groups, shape, dtype, on_progress)
        ]


def _announced(
    groups: tuple[int, ...],
    shape: tuple[int, int],
    dtype: torch.dtype,
    on_progress: Callable[[str], None],
) -> Iterator[int]:
    """Yield the groups, reporting each."""
    for group in groups:
        on_progress(f"{shape[0]} requests of {shape[1]:,} tokens, {dtype}, group size {group}")
        yield group


def _blocks_per_request(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def _make_layers(shape: tuple[int, int], dtype: torch.dtype) -> list[_Layer]:
    """Allocate caches on huge pages where the system has them, as the engine's pool is."""
    num_blocks = shape[0] * _blocks_per_request(shape[1])
    k_shape, v_shape = host_kv_shapes(num_blocks, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    elements = num_blocks * NUM_KV_HEADS * HEAD_DIM * BLOCK_SIZE
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    layers = []
    for _ in range(NUM_LAYERS):
        buffer = mmap.mmap(-1, 2 * elements * dtype.itemsize)
        buffer.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(buffer, dtype=dtype)
        for start in range(0, memory.numel(), pattern.numel()):
            part = memory[start : start + pattern.numel()]
            part.copy_(pattern[: part.numel()])
        layers.append(
            _Layer(memory, memory[:elements].view(k_shape), memory[elements:].view(v_shape))
        )
    return layers


def _measure(
    attention: CpuAttention,
    layers: list[_Layer],
    shape: tuple[int, int],
    group: int,
    rounds: int,
) -> BenchResult:
    """Read and attend in turns."""
    num_requests, num_tokens = shape
    max_blocks = _blocks_per_request(num_tokens)
    generator = torch.Generator().manual_seed(1)
    dtype = layers[0].k.dtype
    blocks = torch.randperm(num_requests * max_blocks, generator=generator, dtype=torch.int32)
    tables = blocks.view(num_requests, max_blocks)
    seq_lens = torch.full((num_requests,), num_tokens, dtype=torch.int32)
    q = torch.randn(num_requests, NUM_KV_HEADS * group, HEAD_DIM, generator=generator).to(dtype)
    out = torch.empty_like(q)
    read_gb_s, attention_gb_s = [], []
    kv_bytes = 2 * num_requests * num_tokens * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    for i in range(rounds + 1):
        layer, other = layers[i % len(layers)], layers[(i + 1) % len(layers)]
        started = time.perf_counter()
        attention.read(other.memory)
        read_s = time.perf_counter() - started
        started = time.perf_counter()
        attention.paged_decode_attention(out, q, layer.k, layer.v, tables, seq_lens, HEAD_DIM**-0.5)
        attention_s = time.perf_counter() - started
        if i:  # the first round warms up
            read_gb_s.append(other.memory.numel() * dtype.itemsize / read_s / 1e9)
            attention_gb_s.append(kv_bytes / attention_s / 1e9)
    pairs = zip(attention_gb_s, read_gb_s, strict=True)
    return BenchResult(
        num_threads=attention.num_threads,
        num_requests=num_requests,
        num_tokens=num_tokens,
        group=group,
        kv_dtype=str(dtype).removeprefix("torch."),
        attention_gb_s=statistics.median(attention_gb_s),
        read_gb_s=statistics.median(read_gb_s),
        ratio=statistics.median(a / r for a, r in pairs),
    )
