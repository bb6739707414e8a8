"""Merges the partial results of a split attention by their log-sum-exps.

Used by decode attention only, which checks all arguments and cuts the workspace with the functions
here.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import wrong
from gpu_kernels.pdl import begin, pdl_options
from gpu_kernels.tiles import MAX_SPLITS, next_power_of_2

TILE_SPLITS = 8


@triton.jit(do_not_specialize=["num_splits", "tile_n", "seq_lens_ptr"])
def merge_splits_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    seq_lens_ptr,
    stride_out,
    num_splits,
    tile_n,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_ALL: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Merges the splits of one query head.

    Grid (num_q_heads, num_seqs). A program owns one output row of HEAD_DIM elements. Only splits
    that hold tokens are read: the others were never written. Rows of empty sequences stay.
    """
    q_head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    begin(USE_PDL)
    seq_len = tl.load(seq_lens_ptr + seq)
    if seq_len == 0:
        return
    num_tiles = tl.cdiv(seq_len, tile_n)
    tiles_per_split = tl.maximum(tl.cdiv(num_tiles, num_splits), 1)
    num_used = tl.cdiv(num_tiles, tiles_per_split)

    offs_d = tl.arange(0, TILE_D)
    offs_s = tl.arange(0, TILE_S)
    offs_all = tl.arange(0, TILE_ALL)
    first = (seq * tl.num_programs(0) + q_head) * num_splits
    lse_all = tl.load(lse_ptr + first + offs_all, mask=offs_all < num_used, other=float("-inf"))
    lse_max = tl.maximum(tl.max(lse_all, 0), -1e30)

    acc = tl.zeros([TILE_D], dtype=tl.float32)
    total = 0.0
    for split_start in range(0, num_used, TILE_S):
        split = split_start + offs_s
        used = split < num_used
        lse = tl.load(lse_ptr + first + split, mask=used, other=float("-inf"))
        weight = tl.exp2(lse - lse_max)
        mask = used[:, None] & (offs_d < HEAD_DIM)[None, :]
        partial_offs = (first + split)[:, None] * HEAD_DIM + offs_d[None, :]
        partial = tl.load(partial_ptr + partial_offs, mask=mask, other=0.0)
        acc += tl.sum(partial * weight[:, None], 0)
        total += tl.sum(weight, 0)
    acc = acc / total
    out_offs = seq * stride_out + q_head * HEAD_DIM + offs_d
    tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


def paged_decode_workspace_size(
    num_seqs: int, num_q_heads: int, head_dim: int, num_splits: int
) -> int:
    """Number of float32 elements that `paged_decode_attention` needs as workspace.

    Args:
        num_seqs: Rows of the batch (the largest, if one workspace serves several).
        num_q_heads: Query heads.
        head_dim: Elements a head.
        num_splits: Splits a sequence; one split needs no workspace.

    Returns:
        Elements of a contiguous float32 tensor.
    """
    if num_splits == 1:
        return 0
    return num_seqs * num_q_heads * num_splits * (head_dim + 1)


def merge_splits(
    out: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    num_splits: int,
    tile_n: int,
) -> None:
    """Merges the splits of every row of `out`; rows of empty sequences stay as they are.

    Args:
        out: [num_seqs, num_q_heads, head_dim], any float dtype, rows may be strided; overwritten.
        partial: [num_seqs * num_q_heads * num_splits * head_dim], float32; normalised results of
            the splits that hold tokens.
        lse: [num_seqs * num_q_heads * num_splits], float32; their base-2 log-sum-exps.
        seq_lens: [num_seqs], int32, tokens.
        num_splits: Splits a sequence.
        tile_n: Tokens a tile, by which splits were cut.
    """
    num_seqs, num_q_heads, head_dim = out.shape
    merge_splits_kernel[(num_q_heads, num_seqs)](
        out, partial, lse, seq_lens, out.stride(0), num_splits, tile_n,
        HEAD_DIM=head_dim, TILE_D=next_power_of_2(head_dim), TILE_S=TILE_SPLITS,
        TILE_ALL=MAX_SPLITS, num_warps=1, **pdl_options(out.device),
    )  # fmt: skip


def split_workspace(
    out: torch.Tensor, num_splits: int, workspace: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts the workspace into partial results and their log-sum-exps.

    Args:
        out: [num_seqs, num_q_heads, head_dim]; returned twice where one split needs no workspace.
        num_splits: Splits a sequence.
        workspace: As of `paged_decode_attention`.

    Returns:
        Two flat float32 tensors, see `merge_splits`.

    Raises:
        ValueError: The workspace is of another dtype or device, strided or too small.
    """
    num_seqs, num_q_heads, head_dim = out.shape
    if num_splits == 1:
        return out, out
    size = paged_decode_workspace_size(num_seqs, num_q_heads, head_dim, num_splits)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=out.device)
    if workspace.dtype is not torch.float32:
        raise wrong("workspace", "dtype float32", workspace.dtype)
    if workspace.device != out.device:
        raise wrong("workspace", f"device {out.device}", workspace.device)
    if workspace.numel() < size or not workspace.is_contiguous():
        raise wrong("workspace", f"{size} contiguous elements", list(workspace.shape))
    flat = workspace.view(-1)
    num_rows = num_seqs * num_q_heads * num_splits
    return flat[: num_rows * head_dim], flat[num_rows * head_dim : size]
