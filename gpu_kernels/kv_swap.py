"""Moves blocks between the device pool and the host pool, for all layers in one launch.

The kernel reads and writes the pinned host pool itself, over PCIe, and transposes K on the way: no
staging buffer, no second pass over host memory, and scattered host blocks cost nothing extra,
because a block of one head is a few contiguous KiB. A program keeps many of them on their way at
once, so that few programs do: a linear layer's kernel takes a multiprocessor whole, and each one
that a copy holds costs it another round of all the others.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import (
    Shape,
    check_contiguous,
    check_dense_rows,
    check_float,
    check_tensor,
    wrong,
)
from gpu_kernels.tiles import GpuClass, gpu_class, next_power_of_2

_TILE_IDS = 256
NUM_PROGRAMS = 16
"""More than PCIe 5 needs for all that it gives, 52 GB/s: one copies 22 GB/s to the host, 11 from it
(H200)."""
_BYTES_ON_THEIR_WAY: dict[GpuClass, int] = {"large": 2**16, "small": 2**15, "scalar": 0}
"""Of a program, at most: what is loaded ahead lies in its shared memory. More gain nothing."""


@triton.jit(do_not_specialize=["device_ids_ptr", "host_ids_ptr", "num_ids", "num_layers"])
def swap_kv_kernel(
    k_cache_ptr,
    v_cache_ptr,
    device_ids_ptr,
    k_host_ptr,
    v_host_ptr,
    host_ids_ptr,
    device_stride_layer: tl.int64,
    host_stride_layer: tl.int64,
    num_ids,
    num_layers,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_D: tl.constexpr,
    TO_HOST: tl.constexpr,
    TILE_IDS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Copies heads of blocks of layers, K transposed on the host's side.

    Grid (num_programs,). The programs share pieces, each K and V of BLOCK_SIZE tokens of one
    (layer, listed block, KV head), counted in this order, up to the last block that is one. The
    layer strides are int64 by type, because a layer of more than 2**31 elements would otherwise be
    a variant of its own.
    """
    offs_i = tl.arange(0, TILE_IDS)
    num_used = 0
    for start in range(0, num_ids, TILE_IDS):
        index = start + offs_i
        listed = tl.load(device_ids_ptr + index, mask=index < num_ids, other=-1)
        num_used = tl.maximum(num_used, tl.max(tl.where(listed >= 0, index + 1, 0), 0))
    num_pieces = num_layers * num_used * NUM_HEADS
    offs_t = tl.arange(0, TILE_T)
    offs_d = tl.arange(0, TILE_D)
    token_major = offs_t[:, None] * HEAD_DIM + offs_d[None, :]
    dim_major = offs_d[:, None] * BLOCK_SIZE + offs_t[None, :]
    mask = (offs_t < BLOCK_SIZE)[:, None] & (offs_d < HEAD_DIM)[None, :]
    mask_t = (offs_d < HEAD_DIM)[:, None] & (offs_t < BLOCK_SIZE)[None, :]
    head_size = BLOCK_SIZE * HEAD_DIM
    for piece in tl.range(tl.program_id(0), num_pieces, tl.num_programs(0), num_stages=NUM_STAGES):
        head = piece % NUM_HEADS
        index = (piece // NUM_HEADS) % num_used
        layer = (piece // NUM_HEADS // num_used).to(tl.int64)
        device_block = tl.load(device_ids_ptr + index).to(tl.int64)
        host_block = tl.load(host_ids_ptr + index).to(tl.int64)
        device_offs = layer * device_stride_layer + (device_block * NUM_HEADS + head) * head_size
        host_offs = layer * host_stride_layer + (host_block * NUM_HEADS + head) * head_size
        # No branch: loads behind one are not made ahead.
        is_block = device_block >= 0
        if TO_HOST:
            k = tl.load(k_cache_ptr + device_offs + token_major, mask=mask & is_block)
            v = tl.load(v_cache_ptr + device_offs + token_major, mask=mask & is_block)
            tl.store(k_host_ptr + host_offs + dim_major, tl.trans(k), mask=mask_t & is_block)
            tl.store(v_host_ptr + host_offs + token_major, v, mask=mask & is_block)
        else:
            k = tl.load(k_host_ptr + host_offs + dim_major, mask=mask_t & is_block)
            v = tl.load(v_host_ptr + host_offs + token_major, mask=mask & is_block)
            tl.store(k_cache_ptr + device_offs + token_major, tl.trans(k), mask=mask & is_block)
            tl.store(v_cache_ptr + device_offs + token_major, v, mask=mask & is_block)


def swap_out_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    device_block_ids: torch.Tensor,
    k_host: torch.Tensor,
    v_host: torch.Tensor,
    host_block_ids: torch.Tensor,
    *,
    max_programs: int = NUM_PROGRAMS,
) -> None:
    """Copies blocks of all layers from the device pool to the host pool, exactly.

    Like any kernel it returns before it ran: the host may read once the stream is synchronised.

    Args:
        k_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_dim], bfloat16, float16 or
            float32, device, each layer contiguous.
        v_cache: Same shape, dtype and strides as k_cache.
        device_block_ids: [n], int32, device, contiguous; the blocks to copy; those below 0 are
            none, and cost nothing behind all others.
        k_host: [num_layers, num_host_blocks, num_kv_heads, head_dim, block_size], k_cache's dtype,
            pinned host memory or on the device, each layer contiguous; the listed blocks are
            overwritten.
        v_host: [num_layers, num_host_blocks, num_kv_heads, block_size, head_dim], otherwise like
            k_host, with its layer stride.
        host_block_ids: [n], int32, device, contiguous, without repeats; where each block goes.
        max_programs: Most programs that do it. Each may keep kernels beside it off a whole
            multiprocessor.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong, or host memory is not
            pinned.
    """
    pools = (k_cache, v_cache, device_block_ids, k_host, v_host, host_block_ids)
    _launch(*pools, to_host=True, max_programs=max_programs)


def swap_in_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    device_block_ids: torch.Tensor,
    k_host: torch.Tensor,
    v_host: torch.Tensor,
    host_block_ids: torch.Tensor,
    *,
    max_programs: int = NUM_PROGRAMS,
) -> None:
    """Copies blocks of all layers from the host pool to the device pool: `swap_out_kv` reversed.

    Args:
        k_cache: As there; the listed blocks are overwritten.
        v_cache: As there; the listed blocks are overwritten.
        device_block_ids: [n], int32, device, contiguous, without repeats; where each block goes;
            those below 0 are none.
        k_host: As there, but only read.
        v_host: As there, but only read.
        host_block_ids: [n], int32, device, contiguous; the blocks to copy.
        max_programs: As there.

    Raises:
        ValueError: As there.
    """
    pools = (k_cache, v_cache, device_block_ids, k_host, v_host, host_block_ids)
    _launch(*pools, to_host=False, max_programs=max_programs)


def _launch(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    device_block_ids: torch.Tensor,
    k_host: torch.Tensor,
    v_host: torch.Tensor,
    host_block_ids: torch.Tensor,
    *,
    to_host: bool,
    max_programs: int,
) -> None:
    """Checks the arguments of either direction and launches the kernel."""
    check_float("k_cache", k_cache, 5)
    num_layers, _, num_kv_heads, block_size, head_dim = k_cache.shape
    device = k_cache.device
    check_tensor("v_cache", v_cache, k_cache.shape, k_cache.dtype, device)
    check_tensor("device_block_ids", device_block_ids, (None,), torch.int32, device)
    check_contiguous("device_block_ids", device_block_ids)
    n = device_block_ids.shape[0]
    check_tensor("host_block_ids", host_block_ids, (n,), torch.int32, device)
    check_contiguous("host_block_ids", host_block_ids)
    _check_host("k_host", k_host, (num_layers, None, num_kv_heads, head_dim, block_size), k_cache)
    v_shape = (num_layers, k_host.shape[1], num_kv_heads, block_size, head_dim)
    _check_host("v_host", v_host, v_shape, k_cache)
    _check_layers("k_cache", k_cache, "v_cache", v_cache)
    _check_layers("k_host", k_host, "v_host", v_host)
    if max_programs < 1:
        raise wrong("max_programs", "at least 1", max_programs)
    if n == 0:
        return
    num_pieces = num_layers * n * num_kv_heads
    tile_t, tile_d = next_power_of_2(block_size), next_power_of_2(head_dim)
    piece_bytes = 2 * tile_t * tile_d * k_cache.element_size()
    swap_kv_kernel[(min(num_pieces, max_programs),)](
        k_cache, v_cache, device_block_ids, k_host, v_host, host_block_ids,
        k_cache.stride(0), k_host.stride(0), n, num_layers,
        NUM_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        TILE_T=tile_t, TILE_D=tile_d, TO_HOST=to_host, TILE_IDS=_TILE_IDS,
        NUM_STAGES=max(1, _BYTES_ON_THEIR_WAY[gpu_class(k_cache.device)] // piece_bytes),
        num_warps=4,
    )  # fmt: skip


def _check_host(name: str, host: torch.Tensor, shape: Shape, like: torch.Tensor) -> None:
    """Checks that half a host pool fits `like`'s pool and that its device can address it."""
    check_tensor(name, host, shape, like.dtype, host.device)
    if host.device != like.device and not host.is_pinned():
        expected = f"pinned host memory or a tensor on {like.device}"
        raise wrong(name, expected, f"pageable memory on {host.device}")


def _check_layers(k_name: str, k: torch.Tensor, v_name: str, v: torch.Tensor) -> None:
    """Checks that each layer of K and V is contiguous and that both have one layer stride."""
    check_dense_rows(k_name, k)
    check_dense_rows(v_name, v)
    if v.stride(0) != k.stride(0):
        raise wrong(v_name, f"layer stride {k.stride(0)}", v.stride(0))
