"""Paged causal prefill attention for a batch of chunks of different lengths.

Bound by arithmetic: a chunk's new tokens attend to everything before them in the KV pool (a
cached prefix) and causally to each other; their own K and V must already be in the pool. Rows of
one token (decodes) are right but not split over the GPU: `decode_attention` is faster for them.
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
    check_heads,
    check_pool,
    check_tensor,
)
from gpu_kernels.tiles import (
    PrefillTiles,
    fills_gpu,
    gpu_class,
    next_power_of_2,
    num_multiprocessors,
    prefill_tiles,
    short_prefill_tiles,
)


@triton.jit
def find_sequence(cu_seqlens_q_ptr, tile, num_seqs, TOKENS_PER_TILE: tl.constexpr):
    """Finds the last sequence whose first tile, cu[i] // TOKENS_PER_TILE + i, is not past `tile`.

    These starts leave each sequence at least the tiles it needs, so a grid of total_q //
    TOKENS_PER_TILE + num_seqs tiles covers any batch without reading lengths on the host.
    """
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        first_tile = tl.load(cu_seqlens_q_ptr + middle) // TOKENS_PER_TILE + middle
        is_right = first_tile <= tile
        low = tl.where(is_right, middle, low)
        high = tl.where(is_right, high, middle)
    return low


@triton.jit
def attend_tiles(
    acc, row_max, row_sum, q, q_pos, k_ptr, v_ptr, table_ptr, head_offs,
    scale_log2, stride_block, start, end,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys [start, end) to a running softmax; MASKED where causality or the end cuts."""
    offs_n = tl.arange(0, TILE_N)
    offs_d = tl.arange(0, TILE_D)
    for tile_start in range(start, end, TILE_N):
        token = tile_start + offs_n
        if MASKED:
            block = tl.load(table_ptr + token // BLOCK_SIZE, mask=token < end, other=0)
        else:
            block = tl.load(table_ptr + token // BLOCK_SIZE)
        row_offs = block.to(tl.int64) * stride_block + (token % BLOCK_SIZE) * HEAD_DIM
        kv_offs = row_offs[:, None] + head_offs[None, :]
        kv_mask = (token < end)[:, None] & (offs_d < HEAD_DIM)[None, :]
        if MASKED or TILE_D != HEAD_DIM:
            k = tl.load(k_ptr + kv_offs, mask=kv_mask, other=0.0)
        else:
            k = tl.load(k_ptr + kv_offs)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = (token[None, :] <= q_pos[:, None]) & (token < end)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        if MASKED or TILE_D != HEAD_DIM:
            v = tl.load(v_ptr + kv_offs, mask=kv_mask, other=0.0)
        else:
            v = tl.load(v_ptr + kv_offs)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=["num_seqs", "stride_table", "cu_seqlens_q_ptr", "seq_lens_ptr", "tables_ptr"]
)
def prefill_attention_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    scale_log2,
    stride_out,
    stride_q,
    stride_block,
    stride_table,
    num_seqs,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Attends from a tile of query tokens, all heads of one group, to everything they may see.

    Grid (num_kv_heads, total_q // TOKENS + num_seqs) with TOKENS = TILE_M // GROUP_SIZE. A program
    owns one KV head and TOKENS consecutive tokens of one sequence: row r of its tile is token
    r // GROUP_SIZE and query head r % GROUP_SIZE, so that the group shares each load of K and V
    and a short row wastes little. Within a sequence the last tokens, which see most, go first.
    """
    TOKENS: tl.constexpr = TILE_M // GROUP_SIZE
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    seq = find_sequence(cu_seqlens_q_ptr, tile, num_seqs, TOKENS)
    q_start = tl.load(cu_seqlens_q_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
    tile_in_seq = tl.cdiv(q_len, TOKENS) - 1 - (tile - (q_start // TOKENS + seq))
    if tile_in_seq < 0 or tile_in_seq * TOKENS >= q_len:
        return
    seq_len = tl.load(seq_lens_ptr + seq)
    first_token = tile_in_seq * TOKENS
    first_pos = seq_len - q_len + first_token
    kv_end = tl.minimum(first_pos + TOKENS, seq_len)

    rows = tl.arange(0, TILE_M)
    offs_d = tl.arange(0, TILE_D)
    token_in_tile = rows // GROUP_SIZE
    in_tile = (token_in_tile < TOKENS) & (first_token + token_in_tile < q_len)
    q_pos = first_pos + token_in_tile
    q_token = (q_start + first_token + token_in_tile).to(tl.int64)
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    q_mask = in_tile[:, None] & (offs_d < HEAD_DIM)[None, :]
    q_offs = (q_token * stride_q + head * HEAD_DIM)[:, None] + offs_d[None, :]
    q = tl.load(q_ptr + q_offs, mask=q_mask, other=0.0)

    table_ptr = tables_ptr + seq.to(tl.int64) * stride_table
    head_offs = kv_head * (BLOCK_SIZE * HEAD_DIM) + offs_d
    row_max = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([TILE_M], dtype=tl.float32)
    acc = tl.zeros([TILE_M, TILE_D], dtype=tl.float32)
    masked_start = (first_pos + 1) // TILE_N * TILE_N
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, q, q_pos, k_ptr, v_ptr, table_ptr, head_offs,
        scale_log2, stride_block, 0, masked_start,
        HEAD_DIM, BLOCK_SIZE, TILE_D, TILE_N, False,
    )  # fmt: skip
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, q, q_pos, k_ptr, v_ptr, table_ptr, head_offs,
        scale_log2, stride_block, masked_start, kv_end,
        HEAD_DIM, BLOCK_SIZE, TILE_D, TILE_N, True,
    )  # fmt: skip
    acc = acc / row_sum[:, None]
    out_offs = (q_token * stride_out + head * HEAD_DIM)[:, None] + offs_d[None, :]
    tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


def paged_prefill_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    tiles: PrefillTiles | None = None,
) -> None:
    """Computes causal attention of each sequence's newest tokens over its cached K and V.

    Query row j of a sequence with n new tokens is token seq_len - n + j and sees the tokens up to
    itself. Scores, softmax and sums are float32. Rows of `out` before cu_seqlens_q[0] and past
    cu_seqlens_q[-1] stay as they are, and sequences without new tokens (padding) cost nothing.

    Args:
        out: [total_q, num_q_heads, head_dim], q's dtype, rows may be strided; overwritten.
        q: [total_q, num_q_heads, head_dim], bfloat16, float16 or float32, rows may be strided.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], q's dtype; one layer's pool.
        v_cache: Like k_cache.
        block_tables: [num_seqs, max_blocks], int32; entries past a sequence's blocks are not read.
        cu_seqlens_q: [num_seqs + 1], int32, the rows where each sequence's new tokens begin, and
            where the last one's end.
        seq_lens: [num_seqs], int32, tokens, cached prefix and new ones together.
        softmax_scale: Factor on q·k before the softmax.
        tiles: Overrides the tile table; for tuning.

    Raises:
        ValueError: An argument's shape, dtype, stride, device or range is wrong.

    Source:
        FlashAttention-2 (Dao, 2023), https://arxiv.org/abs/2307.08691. A grid bounded by
        total_q // TOKENS + num_seqs: vLLM's unified Triton attention.
    """
    check_float("q", q, 3)
    check_float("k_cache", k_cache, 4)
    total_q, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group_size = check_heads(num_q_heads, num_kv_heads, head_dim)
    block_size = check_pool(k_cache, v_cache, num_kv_heads, head_dim, q)
    check_tensor("out", out, q.shape, q.dtype, q.device)
    check_dense_rows("q", q)
    check_dense_rows("out", out)
    check_tensor("seq_lens", seq_lens, (None,), torch.int32, q.device)
    num_seqs = seq_lens.shape[0]
    check_tensor("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,), torch.int32, q.device)
    check_tensor("block_tables", block_tables, (num_seqs, None), torch.int32, q.device)
    check_dense_rows("block_tables", block_tables)
    check_contiguous("seq_lens", seq_lens)
    check_contiguous("cu_seqlens_q", cu_seqlens_q)
    if total_q == 0 or num_seqs == 0:
        return
    if tiles is None:
        shape_class = (head_dim, q.dtype, gpu_class(q.device))
        tiles = prefill_tiles(*shape_class)
        if not fills_gpu(total_q * num_q_heads, num_multiprocessors(q.device), tiles):
            tiles = short_prefill_tiles(*shape_class)
    num_tiles = total_q // (tiles.tile_m // group_size) + num_seqs
    prefill_attention_kernel[(num_kv_heads, num_tiles)](
        out, q, k_cache, v_cache, block_tables, cu_seqlens_q, seq_lens,
        softmax_scale * math.log2(math.e),
        out.stride(0), q.stride(0), k_cache.stride(0), block_tables.stride(0), num_seqs,
        GROUP_SIZE=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        TILE_M=tiles.tile_m, TILE_D=next_power_of_2(head_dim), TILE_N=tiles.tile_n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.max_registers,
    )  # fmt: skip
