"""Paged decode attention: one new token a sequence over a block-table-addressed KV pool.

Bound by memory: every K and V byte of a (sequence, KV head) is read once, for all query heads of
its group together. Sequences are cut into splits so that few sequences still fill the GPU, and
merged by log-sum-exp: few splits by the program that finishes last, many by a second, small kernel.
The new token must already be in the pool.
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
    wrong,
)
from gpu_kernels.merge_splits import merge_splits, split_workspace
from gpu_kernels.pdl import begin, pdl_options
from gpu_kernels.tiles import (
    MAX_SPLITS,
    DecodeTiles,
    decode_num_splits,
    decode_tiles,
    gpu_class,
    next_power_of_2,
    num_multiprocessors,
)

MAX_MERGED_SPLITS = 4
"""Most splits that the last program merges, all at once; more would keep the others waiting."""


@triton.jit
def merge_group(
    out_ptr,
    partial_ptr,
    lse_ptr,
    first_head,
    num_splits,
    num_used,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE_D: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
):
    """Merges the splits of GROUP_SIZE query heads, which other programs may have written.

    The result is GROUP_SIZE rows of HEAD_DIM elements, one behind the other. `first_head` numbers
    the first of the heads in the whole batch; `num_used` of each one's `num_splits` hold tokens.
    """
    offs_g = tl.arange(0, TILE_G)
    offs_d = tl.arange(0, TILE_D)
    is_head = offs_g < GROUP_SIZE
    mask = is_head[:, None] & (offs_d < HEAD_DIM)[None, :]
    best = tl.full([TILE_G], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE_G], dtype=tl.float32)
    acc = tl.zeros([TILE_G, TILE_D], dtype=tl.float32)
    for split in tl.static_range(MERGED_SPLITS):
        is_used = split < num_used
        row = (first_head + offs_g) * num_splits + split
        lse_ptrs = lse_ptr + row
        lse = tl.load(lse_ptrs, mask=is_head & is_used, other=float("-inf"), cache_modifier=".cg")
        partial_ptrs = partial_ptr + row[:, None] * HEAD_DIM + offs_d[None, :]
        partial = tl.load(partial_ptrs, mask=mask & is_used, other=0.0, cache_modifier=".cg")
        new_best = tl.where(is_head, tl.maximum(best, lse), 0.0)
        rescale = tl.exp2(best - new_best)
        weight = tl.exp2(lse - new_best)
        acc = acc * rescale[:, None] + partial * weight[:, None]
        total = total * rescale + weight
        best = new_best
    out_ptrs = out_ptr + offs_g[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "stride_table",
        "num_splits",
        "block_tables_ptr",
        "seq_lens_ptr",
        "counter_ptr",
    ]
)
def decode_attention_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    counter_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    scale_log2,
    stride_out,
    stride_q,
    stride_block,
    stride_table,
    num_splits,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_N: tl.constexpr,
    WRITE_PARTIALS: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Attends from one token's query group to one split of its sequence.

    Grid (num_kv_heads, num_splits, num_seqs). A program owns one (KV head, split, sequence): the
    GROUP_SIZE query heads of that KV head, over tiles [split * n, (split + 1) * n) of TILE_N
    tokens. It writes the result itself when there is one split, else a normalised partial result
    and its base-2 log-sum-exp. Splits past the end of the sequence write nothing. The last one to
    finish merges them, where there are at most MERGED_SPLITS.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    num_q_heads = tl.num_programs(0) * GROUP_SIZE
    # Metadata comes from the host, before any kernel of the step.
    seq_len = tl.load(seq_lens_ptr + seq)
    begin(USE_PDL)
    tiles_per_split = tl.cdiv(tl.cdiv(seq_len, TILE_N), num_splits)
    start = split * tiles_per_split * TILE_N
    end = tl.minimum(start + tiles_per_split * TILE_N, seq_len)

    offs_g = tl.arange(0, TILE_G)
    offs_d = tl.arange(0, TILE_D)
    offs_n = tl.arange(0, TILE_N)
    q_head = kv_head * GROUP_SIZE + offs_g
    q_mask = (offs_g < GROUP_SIZE)[:, None] & (offs_d < HEAD_DIM)[None, :]
    if start >= end:
        return

    q_offs = seq * stride_q + q_head[:, None] * HEAD_DIM + offs_d[None, :]
    q = tl.load(q_ptr + q_offs, mask=q_mask, other=0.0)
    table_ptr = block_tables_ptr + seq * stride_table
    head_offs = kv_head * (BLOCK_SIZE * HEAD_DIM) + offs_d

    row_max = tl.full([TILE_G], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([TILE_G], dtype=tl.float32)
    acc = tl.zeros([TILE_G, TILE_D], dtype=tl.float32)
    for tile_start in range(start, end, TILE_N):
        token = tile_start + offs_n
        in_split = token < end
        block = tl.load(table_ptr + token // BLOCK_SIZE, mask=in_split, other=0).to(tl.int64)
        row_offs = block * stride_block + (token % BLOCK_SIZE) * HEAD_DIM
        kv_offs = row_offs[:, None] + head_offs[None, :]
        kv_mask = in_split[:, None]
        if TILE_D != HEAD_DIM:
            kv_mask = kv_mask & (offs_d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + kv_offs, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + kv_offs, mask=kv_mask, other=0.0)

        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(in_split[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max

    acc = acc / row_sum[:, None]
    if WRITE_PARTIALS:
        row = (seq * num_q_heads + q_head) * num_splits + split
        tl.store(partial_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=q_mask)
        tl.store(lse_ptr + row, row_max + tl.log2(row_sum), mask=offs_g < GROUP_SIZE)
        if MERGED_SPLITS > 0:
            tl.debug_barrier()
            counter_ptrs = counter_ptr + seq * tl.num_programs(0) + kv_head
            num_done = tl.atomic_add(counter_ptrs, 1, sem="acq_rel")
            num_used = tl.cdiv(tl.cdiv(seq_len, TILE_N), tiles_per_split)
            if num_done == num_used - 1:
                tl.store(counter_ptrs, 0)
                first_head = seq * num_q_heads + kv_head * GROUP_SIZE
                out_group_ptr = out_ptr + seq * stride_out + kv_head * GROUP_SIZE * HEAD_DIM
                merge_group(
                    out_group_ptr, partial_ptr, lse_ptr, first_head, num_splits, num_used,
                    GROUP_SIZE, HEAD_DIM, TILE_G, TILE_D, MERGED_SPLITS,
                )  # fmt: skip
    else:
        out_offs = seq * stride_out + q_head[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


def paged_decode_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    max_seq_len: int,
    num_splits: int | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    tiles: DecodeTiles | None = None,
) -> None:
    """Computes attention of one new token a sequence over its cached K and V.

    Scores, softmax and sums are float32. Rows with seq_len 0 (padding of a captured batch) read
    neither block table nor pool and stay as they are. The result depends on `num_splits` by
    rounding; fix it, or `max_seq_len`, where runs must repeat bit for bit.

    Args:
        out: [num_seqs, num_q_heads, head_dim], q's dtype, rows may be strided; overwritten.
        q: [num_seqs, num_q_heads, head_dim], bfloat16, float16 or float32, rows may be strided.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], q's dtype; one layer's pool.
        v_cache: Like k_cache.
        block_tables: [num_seqs, max_blocks], int32; entries past a sequence's blocks are not read.
        seq_lens: [num_seqs], int32, tokens, the new one included (its K and V are in the pool).
        softmax_scale: Factor on q·k before the softmax.
        max_seq_len: Host-side bound or estimate of the longest sequence, tokens; it steers
            the splits only, the result is right whatever it is.
        num_splits: Splits a sequence, 1 to 64; None lets `decode_num_splits` choose.
        workspace: Contiguous float32 tensor of at least `paged_decode_workspace_size` elements;
            None allocates one (from the caching allocator, safe under graph capture).
        counters: At least num_seqs * num_kv_heads elements, int32, all zero before and after: count
            the finished splits. None: a second kernel merges them, however few. Calls that may
            overlap need counters of their own.
        tiles: Overrides the tile table; for tuning.

    Raises:
        ValueError: An argument's shape, dtype, stride, device or range is wrong.

    Source:
        Flash-decoding (Dao, Haziza, Massa, Sizov, 2023), https://pytorch.org/blog/flash-decoding/
    """
    check_float("q", q, 3)
    check_float("k_cache", k_cache, 4)
    num_seqs, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group_size = check_heads(num_q_heads, num_kv_heads, head_dim)
    block_size = check_pool(k_cache, v_cache, num_kv_heads, head_dim, q)
    check_tensor("out", out, q.shape, q.dtype, q.device)
    check_dense_rows("q", q)
    check_dense_rows("out", out)
    check_tensor("block_tables", block_tables, (num_seqs, None), torch.int32, q.device)
    check_dense_rows("block_tables", block_tables)
    check_tensor("seq_lens", seq_lens, (num_seqs,), torch.int32, q.device)
    check_contiguous("seq_lens", seq_lens)
    if max_seq_len < 1:
        raise wrong("max_seq_len", "at least 1", max_seq_len)
    if num_splits is None:
        num_sms = num_multiprocessors(q.device)
        num_splits = decode_num_splits(num_seqs, num_kv_heads, max_seq_len, num_sms)
    if not 1 <= num_splits <= MAX_SPLITS:
        raise wrong("num_splits", f"1 to {MAX_SPLITS}", num_splits)
    if num_seqs == 0:
        return
    if tiles is None:
        tiles = decode_tiles(head_dim, q.dtype, gpu_class(q.device))
    partial, lse = split_workspace(out, num_splits, workspace)
    merges = counters is not None and 1 < num_splits <= MAX_MERGED_SPLITS
    if counters is not None:
        check_tensor("counters", counters, (None,), torch.int32, q.device)
        check_contiguous("counters", counters)
        if len(counters) < num_seqs * num_kv_heads:
            raise wrong("counters", f"{num_seqs * num_kv_heads} elements", len(counters))
    tile_d = next_power_of_2(head_dim)
    decode_attention_kernel[(num_kv_heads, num_splits, num_seqs)](
        out, partial, lse, seq_lens if counters is None else counters,
        q, k_cache, v_cache, block_tables, seq_lens,
        softmax_scale * math.log2(math.e),
        out.stride(0), q.stride(0), k_cache.stride(0), block_tables.stride(0), num_splits,
        GROUP_SIZE=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        TILE_G=16, TILE_D=tile_d, TILE_N=tiles.tile_n, WRITE_PARTIALS=num_splits > 1,
        MERGED_SPLITS=MAX_MERGED_SPLITS if merges else 0,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        **pdl_options(q.device),
    )  # fmt: skip
    if num_splits > 1 and not merges:
        merge_splits(out, partial, lse, seq_lens, num_splits, tiles.tile_n)
