"""Decode attention whose K and V stay in the host pool: the GPU reads them over PCIe as it attends.

The CPU's attention is bound by the bandwidth of host memory as its cores get it, and PCIe adds to
that. A few small programs do it beside the step's other kernels, which they are to leave the
multiprocessors to: one warp each, that waits for memory nearly all the time.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import (
    check_contiguous,
    check_dense_rows,
    check_float,
    check_tensor,
    wrong,
)
from gpu_kernels.tiles import next_power_of_2

NUM_PROGRAMS = 8
NUM_STAGES = 8
_MAX_TILE_BYTES = 2**13
"""Of a block's K in one head, for so many stages. Larger ones are more bytes on their way with half
of them, and would not fit shared memory with all (head_dim 128, float32, blocks of 64: 236 KiB)."""
ENTRY_FIELDS = 4


@triton.jit(do_not_specialize=["entries_ptr", "blocks_ptr", "num_entries", "stride_entries"])
def host_pool_attention_kernel(
    out_ptr,
    sent_ptr,
    entries_ptr,
    blocks_ptr,
    k_host_ptr,
    v_host_ptr,
    scale_log2,
    num_entries,
    stride_entries,
    stride_out,
    stride_sent,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Attends from one row's query group at a time, block after block.

    Grid (programs,). The programs share num_entries * NUM_KV_HEADS tasks, an (entry, KV head) each.
    The new token's K and V come from its row: the host pool has them later.
    """
    GROUP_SIZE: tl.constexpr = NUM_Q_HEADS // NUM_KV_HEADS
    offs_g = tl.arange(0, TILE_G)
    offs_d = tl.arange(0, TILE_D)
    offs_n = tl.arange(0, BLOCK_SIZE)
    mask_d = offs_d < HEAD_DIM
    q_mask = (offs_g < GROUP_SIZE)[:, None] & mask_d[None, :]
    k_offs = offs_d[:, None] * BLOCK_SIZE + offs_n[None, :]
    v_offs = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
    for task in range(tl.program_id(0), num_entries * NUM_KV_HEADS, tl.num_programs(0)):
        entry_ptr = entries_ptr + task // NUM_KV_HEADS
        kv_head = task % NUM_KV_HEADS
        num_past = tl.load(entry_ptr + 2 * stride_entries) - 1
        if num_past >= 0:
            row_ptr = sent_ptr + tl.load(entry_ptr).to(tl.int64) * stride_sent
            out_row = tl.load(entry_ptr + stride_entries).to(tl.int64)
            table_ptr = blocks_ptr + tl.load(entry_ptr + 3 * stride_entries)
            q_heads = kv_head * GROUP_SIZE + offs_g
            q_offs = q_heads[:, None] * HEAD_DIM + offs_d[None, :]
            q = tl.load(row_ptr + q_offs, mask=q_mask, other=0.0)
            k_new_ptr = row_ptr + (NUM_Q_HEADS + kv_head) * HEAD_DIM
            k_new = tl.load(k_new_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            v_new_ptr = k_new_ptr + NUM_KV_HEADS * HEAD_DIM
            v_new = tl.load(v_new_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            row_max = tl.sum(q.to(tl.float32) * k_new[None, :], 1) * scale_log2
            row_sum = tl.full([TILE_G], 1.0, dtype=tl.float32)
            acc = tl.zeros([TILE_G, TILE_D], dtype=tl.float32) + v_new[None, :]
            for start in range(0, num_past, BLOCK_SIZE):
                block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
                head_offs = (block * NUM_KV_HEADS + kv_head) * (HEAD_DIM * BLOCK_SIZE)
                is_past = start + offs_n < num_past
                if TILE_D == HEAD_DIM:
                    k = tl.load(k_host_ptr + head_offs + k_offs)
                    v = tl.load(v_host_ptr + head_offs + v_offs)
                else:
                    k = tl.load(k_host_ptr + head_offs + k_offs, mask=mask_d[:, None], other=0.0)
                    v = tl.load(v_host_ptr + head_offs + v_offs, mask=mask_d[None, :], other=0.0)
                scores = tl.dot(q, k, input_precision="ieee") * scale_log2
                scores = tl.where(is_past[None, :], scores, float("-inf"))
                # What lies behind the end of a request may be anything, and 0 times it not a 0.
                v = tl.where(is_past[:, None], v, 0.0)
                new_max = tl.maximum(row_max, tl.max(scores, 1))
                rescale = tl.exp2(row_max - new_max)
                weights = tl.exp2(scores - new_max[:, None])
                row_sum = row_sum * rescale + tl.sum(weights, 1)
                acc = acc * rescale[:, None]
                acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
                row_max = new_max
            acc = acc / row_sum[:, None]
            out_ptrs = out_ptr + out_row * stride_out + q_offs
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


def host_pool_attention(
    out: torch.Tensor,
    sent: torch.Tensor,
    entries: torch.Tensor,
    blocks: torch.Tensor,
    k_host: torch.Tensor,
    v_host: torch.Tensor,
    softmax_scale: float,
    *,
    num_programs: int = NUM_PROGRAMS,
    num_stages: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Computes attention of new tokens over K and V that are in the host pool but for their own.

    Scores, softmax and sums are float32. Entries with a length of 0 do nothing.

    Args:
        out: [num_rows, num_q_heads * head_dim], sent's dtype, rows may be strided; those that
            entries name are overwritten.
        sent: [n, (num_q_heads + 2 * num_kv_heads) * head_dim], bfloat16, float16 or float32, rows
            may be strided: rotated q, k, and v, as `depart_rows` leaves them.
        entries: [ENTRY_FIELDS, num_entries], int32: of each entry the row of `sent`, the row of
            `out`, the tokens to attend to with the new one, and where in `blocks` its own begin.
        blocks: [num_blocks], int32: blocks of the host pool, those of an entry in its tokens'
            order.
        k_host: [num_host_blocks, num_kv_heads, head_dim, block_size], sent's dtype, pinned (or on
            the device): one layer's pool, or that of all layers seen as one.
        v_host: [num_host_blocks, num_kv_heads, block_size, head_dim], likewise.
        softmax_scale: Factor on q·k before the softmax.
        num_programs: More get more of PCIe's bandwidth, and disturb other kernels more.
        num_stages: Of the software pipeline; None: as many as PCIe needs and shared memory holds.
        num_warps: Of a program; None: as few as have registers for its sums.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    check_float("sent", sent, 2)
    check_dense_rows("sent", sent)
    check_tensor("k_host", k_host, (None, None, None, None), sent.dtype, k_host.device)
    num_host_blocks, num_kv_heads, head_dim, block_size = k_host.shape
    v_shape = (num_host_blocks, num_kv_heads, block_size, head_dim)
    check_tensor("v_host", v_host, v_shape, sent.dtype, k_host.device)
    for name, pool in (("k_host", k_host), ("v_host", v_host)):
        check_contiguous(name, pool)
        if pool.device != sent.device and not pool.is_pinned():
            expected = f"pinned host memory or a tensor on {sent.device}"
            raise wrong(name, expected, f"pageable memory on {pool.device}")
    q_width = sent.shape[1] - 2 * num_kv_heads * head_dim
    num_q_heads = q_width // head_dim
    if q_width < 1 or q_width % head_dim or num_q_heads % num_kv_heads:
        expected = f"(n * {num_kv_heads} + 2 * {num_kv_heads}) * {head_dim}, n at least 1"
        raise wrong("sent width", expected, sent.shape[1])
    check_tensor("out", out, (None, q_width), sent.dtype, sent.device)
    check_dense_rows("out", out)
    check_tensor("entries", entries, (ENTRY_FIELDS, None), torch.int32, sent.device)
    check_dense_rows("entries", entries)
    check_tensor("blocks", blocks, (None,), torch.int32, sent.device)
    check_contiguous("blocks", blocks)
    num_entries = entries.shape[1]
    if num_entries == 0:
        return
    if num_stages is None:
        tile_bytes = next_power_of_2(head_dim) * block_size * sent.element_size()
        num_stages = NUM_STAGES if tile_bytes <= _MAX_TILE_BYTES else NUM_STAGES // 2
    if num_warps is None:
        num_warps = 1 if head_dim <= 128 and sent.dtype != torch.float32 else 4
    host_pool_attention_kernel[(num_programs,)](
        out, sent, entries, blocks, k_host, v_host,
        softmax_scale * math.log2(math.e), num_entries, entries.stride(0),
        out.stride(0), sent.stride(0),
        NUM_Q_HEADS=num_q_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, TILE_G=max(16, next_power_of_2(num_q_heads // num_kv_heads)),
        TILE_D=next_power_of_2(head_dim), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
