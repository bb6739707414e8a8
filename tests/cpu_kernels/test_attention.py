"""Decode attention against the oracle; appending; independence of batch and threads."""

from dataclasses import replace

import pytest
import torch

from cpu_kernels.attention import CpuAttention
from tests.cpu_kernels.oracle import Case, fill_cache, make_case

pytestmark = pytest.mark.ispc

MIXED = [1, 300, 0, 16, 1100, 17, 15, 512, 513]


def run(attention: CpuAttention, case: Case, **rows: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(case.q, torch.nan)
    attention.paged_decode_attention(
        out,
        case.q,
        case.k_cache,
        case.v_cache,
        case.block_tables,
        case.seq_lens,
        case.scale,
        **rows,
    )
    return out


def assert_close(actual: torch.Tensor, case: Case) -> None:
    """Max error at most twice that of plain torch in the tensors' own type, plus 1e-5."""
    expected = case.expected()
    torch_error = (case.expected(actual.dtype).float() - expected).abs().max()
    error = (actual.float() - expected).abs().max()
    assert error <= 2 * torch_error + 1e-5


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("length", ["1", "block-1", "block", "block+1", "long", "mixed"])
def test_lengths(attention: CpuAttention, block_size: int, length: str) -> None:
    lengths = {
        "1": [1],
        "block-1": [block_size - 1],
        "block": [block_size],
        "block+1": [block_size + 1],
        "long": [5000],
        "mixed": MIXED,
    }
    case = make_case(lengths[length], block_size=block_size)
    assert_close(run(attention, case), case)


def test_more_elements_than_31_bits_count(attention: CpuAttention) -> None:
    """Overlap mode sees the whole host pool as one layer."""
    case = make_case([100], cache_dtype=torch.bfloat16)
    small, heads = case.k_cache.shape[0], case.k_cache.shape[1:].numel()
    num_blocks = 2**31 // heads + small
    caches = []
    for cache in (case.k_cache, case.v_cache):
        # Only what is written takes memory.
        large = torch.empty(num_blocks, *cache.shape[1:], dtype=cache.dtype)
        large[-small:] = cache
        caches.append(large)
    tables = case.block_tables + num_blocks - small
    moved = replace(case, k_cache=caches[0], v_cache=caches[1], block_tables=tables)
    assert torch.equal(run(attention, moved), run(attention, case))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims_and_cache_types(
    attention: CpuAttention, head_dim: int, cache_dtype: torch.dtype
) -> None:
    case = make_case([1, 100, 700], head_dim=head_dim, cache_dtype=cache_dtype)
    assert_close(run(attention, case), case)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_group_sizes(attention: CpuAttention, group: int, head_dim: int) -> None:
    case = make_case([33, 600], group=group, head_dim=head_dim)
    assert_close(run(attention, case), case)


@pytest.mark.parametrize("io_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_query_types(
    attention: CpuAttention, io_dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    case = make_case(MIXED, io_dtype=io_dtype, cache_dtype=cache_dtype)
    out = run(attention, case)
    assert out.dtype == io_dtype
    assert_close(out, case)


def test_scores_far_apart_neither_overflow_nor_vanish(attention: CpuAttention) -> None:
    case = make_case([1300], cache_dtype=torch.float32)
    case.q *= 30
    exact = case.expected(torch.float64)
    torch_error = (case.expected() - exact).abs().max()
    assert (run(attention, case) - exact).abs().max() <= 2 * torch_error + 1e-5


def test_one_kv_head_and_many(attention: CpuAttention) -> None:
    for num_kv_heads in (1, 9):
        case = make_case([70, 520], num_kv_heads=num_kv_heads, group=3, head_dim=64)
        assert_close(run(attention, case), case)


def test_empty_batch(attention: CpuAttention) -> None:
    case = make_case([])
    assert run(attention, case).shape == (0, 8, 128)


def test_length_zero_gives_zeros_and_appends_nothing(attention: CpuAttention) -> None:
    case = make_case([0, 5])
    before = case.k_cache.clone()
    rows = torch.randn(2, 2, 128)
    out = run(attention, case, k=rows, v=rows)
    assert (out[0] == 0).all()
    changed = (case.k_cache.nan_to_num() != before.nan_to_num()).any(dim=(1, 2, 3))
    assert set(changed.nonzero().flatten().tolist()) <= {int(case.block_tables[1, 0])}


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("io_dtype", [torch.bfloat16, torch.float32])
def test_append_equals_store(
    attention: CpuAttention, cache_dtype: torch.dtype, io_dtype: torch.dtype, block_size: int
) -> None:
    lengths = [1, 16, 17, 64, 65, 512, 513, 1000]
    stored = make_case(lengths, cache_dtype=cache_dtype, io_dtype=io_dtype, block_size=block_size)
    appended = make_case(lengths, cache_dtype=cache_dtype, io_dtype=io_dtype, block_size=block_size)
    k, v = torch.randn(2, len(lengths), 2, 128).to(io_dtype)
    for seq, seq_len in enumerate(lengths):
        stored.k_rows[seq][-1] = k[seq].to(cache_dtype)
        stored.v_rows[seq][-1] = v[seq].to(cache_dtype)
        fill_cache(stored, seq, seq_len - 1, seq_len)
    # Zeros where the new token goes: reading it before writing it would show.
    for seq, seq_len in enumerate(lengths):
        appended.k_rows[seq][-1] = 0
        appended.v_rows[seq][-1] = 0
        fill_cache(appended, seq, seq_len - 1, seq_len)
    assert torch.equal(run(attention, stored), run(attention, appended, k=k, v=v))
    assert torch.equal(stored.k_cache.nan_to_num(7), appended.k_cache.nan_to_num(7))
    assert torch.equal(stored.v_cache.nan_to_num(7), appended.v_cache.nan_to_num(7))


def test_rows_of_a_fused_projection(attention: CpuAttention) -> None:
    case = make_case(MIXED)
    fused = torch.randn(len(MIXED), (8 + 2 + 2) * 128)
    fused[:, : 8 * 128] = case.q.flatten(1)
    parts = fused.split([8 * 128, 2 * 128, 2 * 128], dim=1)
    q, k, v = (part.unflatten(1, (-1, 128)) for part in parts)
    expected = run(attention, case, k=k.contiguous(), v=v.contiguous())
    wide = torch.full((len(MIXED), 3000), torch.nan)
    out = wide[:, 100 : 100 + 8 * 128].unflatten(1, (8, 128))
    attention.paged_decode_attention(
        out,
        q,
        case.k_cache,
        case.v_cache,
        case.block_tables,
        case.seq_lens,
        case.scale,
        k=k,
        v=v,
    )
    assert torch.equal(out, expected)
    assert wide[:, :100].isnan().all()
    assert wide[:, 100 + 8 * 128 :].isnan().all()


def test_result_is_independent_of_batch_and_threads(
    attention: CpuAttention, kernel_cache: object
) -> None:
    case = make_case(MIXED)
    together = run(attention, case)
    for seq in range(len(MIXED)):
        alone = torch.empty_like(case.q[seq : seq + 1])
        attention.paged_decode_attention(
            alone,
            case.q[seq : seq + 1],
            case.k_cache,
            case.v_cache,
            case.block_tables[seq : seq + 1],
            case.seq_lens[seq : seq + 1],
            case.scale,
        )
        assert torch.equal(alone[0], together[seq])
    for num_threads in (1, 3, 5):
        with CpuAttention(kernel_cache, num_threads, pin=num_threads == 3) as other:
            assert torch.equal(run(other, case), together)
