"""Moves blocks of one layer between the device pool and contiguous staging in the host layout.

The host layout holds K transposed inside the block, [head_dim, block_size], because the CPU's
attention runs its lanes over tokens; V stays token-major. Packing runs at memory bandwidth so that
a swap costs what PCIe costs. The copies between staging and host memory are the caller's.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import check_contiguous, check_float, check_pool, check_tensor
from gpu_kernels.tiles import next_power_of_2


@triton.jit(do_not_specialize=["block_ids_ptr"])
def pack_kv_kernel(
    k_cache_ptr,
    v_cache_ptr,
    block_ids_ptr,
    k_host_ptr,
    v_host_ptr,
    stride_block,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_D: tl.constexpr,
    UNPACK: tl.constexpr,
):
    """Copies one head of one block, K transposed, into (or, UNPACK, out of) the host layout.

    Grid (num_kv_heads, num_ids). A program owns one (KV head, listed block): K and V of
    BLOCK_SIZE tokens. A negative block id is skipped.
    """
    head = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    block = tl.load(block_ids_ptr + index).to(tl.int64)
    if block < 0:
        return
    offs_t = tl.arange(0, TILE_T)
    offs_d = tl.arange(0, TILE_D)
    token_major = offs_t[:, None] * HEAD_DIM + offs_d[None, :]
    dim_major = offs_d[:, None] * BLOCK_SIZE + offs_t[None, :]
    mask = (offs_t < BLOCK_SIZE)[:, None] & (offs_d < HEAD_DIM)[None, :]
    mask_t = (offs_d < HEAD_DIM)[:, None] & (offs_t < BLOCK_SIZE)[None, :]
    device_offs = block * stride_block + head * (BLOCK_SIZE * HEAD_DIM)
    host_offs = (index * tl.num_programs(0) + head) * (BLOCK_SIZE * HEAD_DIM)
    if UNPACK:
        k = tl.load(k_host_ptr + host_offs + dim_major, mask=mask_t)
        v = tl.load(v_host_ptr + host_offs + token_major, mask=mask)
        tl.store(k_cache_ptr + device_offs + token_major, tl.trans(k), mask=mask)
        tl.store(v_cache_ptr + device_offs + token_major, v, mask=mask)
    else:
        k = tl.load(k_cache_ptr + device_offs + token_major, mask=mask)
        v = tl.load(v_cache_ptr + device_offs + token_major, mask=mask)
        tl.store(k_host_ptr + host_offs + dim_major, tl.trans(k), mask=mask_t)
        tl.store(v_host_ptr + host_offs + token_major, v, mask=mask)


def pack_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_ids: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
) -> None:
    """Gathers blocks of one layer of the device pool into staging in the host layout, exactly.

    Args:
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], bfloat16, float16 or float32.
        v_cache: Like k_cache.
        block_ids: [n], int32, device blocks in staging order; a negative id leaves its place.
        k_out: [n, num_kv_heads, head_dim, block_size], k_cache's dtype, contiguous; overwritten.
        v_out: [n, num_kv_heads, block_size, head_dim], k_cache's dtype, contiguous; overwritten.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    _launch(k_cache, v_cache, block_ids, k_out, v_out, ("k_out", "v_out"), unpack=False)


def unpack_kv(
    k_in: torch.Tensor,
    v_in: torch.Tensor,
    block_ids: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Scatters staging in the host layout into blocks of one layer of the device pool, exactly.

    Args:
        k_in: [n, num_kv_heads, head_dim, block_size], k_cache's dtype, contiguous.
        v_in: [n, num_kv_heads, block_size, head_dim], k_cache's dtype, contiguous.
        block_ids: [n], int32, device block of each staged block, without repeats; a negative id
            skips its block.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim]; the listed blocks are
            overwritten.
        v_cache: Like k_cache.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    _launch(k_cache, v_cache, block_ids, k_in, v_in, ("k_in", "v_in"), unpack=True)


def _launch(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_ids: torch.Tensor,
    k_host: torch.Tensor,
    v_host: torch.Tensor,
    host_names: tuple[str, str],
    *,
    unpack: bool,
) -> None:
    """Checks the arguments of either direction and launches the kernel."""
    check_float("k_cache", k_cache, 4)
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    block_size = check_pool(k_cache, v_cache, num_kv_heads, head_dim, k_cache)
    check_tensor("block_ids", block_ids, (None,), torch.int32, k_cache.device)
    check_contiguous("block_ids", block_ids)
    n = block_ids.shape[0]
    shapes = ((n, num_kv_heads, head_dim, block_size), (n, num_kv_heads, block_size, head_dim))
    for name, tensor, shape in zip(host_names, (k_host, v_host), shapes, strict=True):
        check_tensor(name, tensor, shape, k_cache.dtype, k_cache.device)
        check_contiguous(name, tensor)
    if n == 0:
        return
    pack_kv_kernel[(num_kv_heads, n)](
        k_cache, v_cache, block_ids, k_host, v_host, k_cache.stride(0),
        HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        TILE_T=next_power_of_2(block_size), TILE_D=next_power_of_2(head_dim),
        UNPACK=unpack, num_warps=4,
    )  # fmt: skip
