"""The plain store of K and V rows into the device pool, for models that rotate elsewhere or not."""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import (
    check_contiguous,
    check_dense_rows,
    check_float,
    check_pool,
    check_tensor,
)
from gpu_kernels.tiles import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["slot_mapping_ptr"])
def store_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    stride_k,
    stride_v,
    stride_block,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Copies a tile of KV heads of one token into its slot.

    Grid (num_tokens, cdiv(NUM_KV_HEADS, TILE_H)). A program owns one token and TILE_H heads.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot < 0:
        return
    heads = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    offs_d = tl.arange(0, TILE_D)
    mask = (heads < NUM_KV_HEADS)[:, None] & (offs_d < HEAD_DIM)[None, :]
    row_offs = heads[:, None] * HEAD_DIM + offs_d[None, :]
    k = tl.load(k_ptr + token * stride_k + row_offs, mask=mask)
    v = tl.load(v_ptr + token * stride_v + row_offs, mask=mask)
    slot_offs = (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * HEAD_DIM
    cache_offs = slot_offs + heads[:, None] * (BLOCK_SIZE * HEAD_DIM) + offs_d[None, :]
    tl.store(k_cache_ptr + cache_offs, k, mask=mask)
    tl.store(v_cache_ptr + cache_offs, v, mask=mask)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Stores each token's K and V into its slot of one layer's device pool, bit for bit.

    Args:
        k: [num_tokens, num_kv_heads, head_dim], bfloat16, float16 or float32, rows may be strided.
        v: Like k.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], k's dtype; one layer's pool.
        v_cache: Like k_cache.
        slot_mapping: [num_tokens], int64, block * block_size + offset; negative: do not store.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    check_float("k", k, 3)
    num_tokens, num_kv_heads, head_dim = k.shape
    check_tensor("v", v, k.shape, k.dtype, k.device)
    check_dense_rows("k", k)
    check_dense_rows("v", v)
    block_size = check_pool(k_cache, v_cache, num_kv_heads, head_dim, k)
    check_tensor("slot_mapping", slot_mapping, (num_tokens,), torch.int64, k.device)
    check_contiguous("slot_mapping", slot_mapping)
    if num_tokens == 0:
        return
    tile_h = min(16, next_power_of_2(num_kv_heads))
    store_kv_kernel[(num_tokens, cdiv(num_kv_heads, tile_h))](
        k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), k_cache.stride(0),
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        TILE_H=tile_h, TILE_D=next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
