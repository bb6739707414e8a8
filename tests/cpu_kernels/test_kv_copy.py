"""Storing and gathering KV: exact."""

import pytest
import torch

from cpu_kernels.attention import CpuAttention
from tests.cpu_kernels.oracle import make_case

pytestmark = pytest.mark.ispc


def slots_of(tables: torch.Tensor, seq: int, seq_len: int, block_size: int) -> torch.Tensor:
    position = torch.arange(seq_len)
    return tables[seq, position // block_size].long() * block_size + position % block_size


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("io_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_store_fills_the_cache_like_the_oracle(
    attention: CpuAttention, io_dtype: torch.dtype, cache_dtype: torch.dtype, block_size: int
) -> None:
    lengths = [1, 15, 16, 17, 130]
    case = make_case(lengths, block_size=block_size, cache_dtype=cache_dtype, head_dim=80)
    generator = torch.Generator().manual_seed(3)
    k_cache = torch.full_like(case.k_cache, torch.nan)
    v_cache = torch.full_like(case.v_cache, torch.nan)
    for seq, seq_len in enumerate(lengths):
        k, v = torch.randn(2, seq_len, 2, 80, generator=generator).to(io_dtype)
        slots = slots_of(case.block_tables, seq, seq_len, block_size)
        attention.store_kv(k, v, k_cache, v_cache, slots)
        for token, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, block_size)
            assert torch.equal(k_cache[block, :, :, offset], k[token].to(cache_dtype))
            assert torch.equal(v_cache[block, :, offset], v[token].to(cache_dtype))
    num_stored = sum(lengths) * 2 * 80
    assert k_cache.isnan().sum() == k_cache.numel() - num_stored
    assert v_cache.isnan().sum() == v_cache.numel() - num_stored


def test_store_converts_specials(attention: CpuAttention) -> None:
    values = [0.0, -0.0, torch.inf, -torch.inf, 1e-40, 65519.0, 65520.0, 3.4e38, 1.00390625]
    row = torch.tensor((values * 8)[:64]).view(1, 1, 64)
    for dtype in (torch.bfloat16, torch.float16):
        k_cache = torch.zeros(1, 1, 64, 16, dtype=dtype)
        v_cache = torch.zeros(1, 1, 16, 64, dtype=dtype)
        attention.store_kv(row, row, k_cache, v_cache, torch.tensor([3]))
        as_bits = row[0, 0].to(dtype).view(torch.int16)
        assert torch.equal(k_cache[0, 0, :, 3].contiguous().view(torch.int16), as_bits)
        assert torch.equal(v_cache[0, 0, 3].view(torch.int16), as_bits)
        attention.store_kv(row * torch.nan, row, k_cache, v_cache, torch.tensor([3]))
        assert k_cache[0, 0, :, 3].isnan().all()


def test_store_skips_negative_slots(attention: CpuAttention) -> None:
    k_cache = torch.zeros(2, 1, 64, 16)
    v_cache = torch.zeros(2, 1, 16, 64)
    k, v = torch.ones(2, 3, 1, 64)
    attention.store_kv(k, v, k_cache, v_cache, torch.tensor([-1, 17, -5]))
    assert k_cache.sum() == v_cache.sum() == 64
    assert (k_cache[1, 0, :, 1] == 1).all()


def test_store_takes_strided_rows(attention: CpuAttention) -> None:
    fused = torch.randn(20, 3, 2, 64)
    caches = [torch.zeros(2, 2, 64, 16), torch.zeros(2, 2, 16, 64)]
    others = [cache.clone() for cache in caches]
    slots = torch.randperm(32)[:20]
    attention.store_kv(fused[:, 1], fused[:, 2], *caches, slots)
    attention.store_kv(fused[:, 1].contiguous(), fused[:, 2].contiguous(), *others, slots)
    assert torch.equal(caches[0], others[0])
    assert torch.equal(caches[1], others[1])


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block_size", [16, 64])
def test_gather_returns_what_was_stored(
    attention: CpuAttention, block_size: int, cache_dtype: torch.dtype
) -> None:
    lengths = [0, 1, 15, 64, 333]
    case = make_case(lengths, block_size=block_size, cache_dtype=cache_dtype, num_kv_heads=3)
    for seq, seq_len in enumerate(lengths):
        k, v = attention.gather_kv(case.k_cache, case.v_cache, case.block_tables[seq], seq_len)
        assert torch.equal(k, case.k_rows[seq])
        assert torch.equal(v, case.v_rows[seq])
