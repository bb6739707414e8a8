"""Rows that are in the batch for one layer only: what they take along, and what they come back to.

Overlap mode's rotating rows leave a layer with rotated Q, K and V, which go to the host, and keep
their residual stream aside; they rejoin behind a later layer's attention with the host's answer.
Each way is one kernel, because a layer of a decode step has no time for the launches of five.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

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
from gpu_kernels.pdl import begin, pdl_options
from gpu_kernels.rope_store import check_norm_weights, check_rotary, head_tiles, rotated_heads
from gpu_kernels.tiles import cdiv, next_power_of_2

_TILE = 1024
"""Elements that a program copies."""


@triton.jit
def copy_tile(dst_ptr, src_ptr, tile, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Copies a tile of one row."""
    offs = tile * TILE + tl.arange(0, TILE)
    mask = offs < SIZE
    tl.store(dst_ptr + offs, tl.load(src_ptr + offs, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["positions_ptr", "slots_ptr"])
def depart_rows_kernel(
    sent_ptr,
    kept_ptr,
    qkv_ptr,
    residual_ptr,
    positions_ptr,
    slots_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    stride_sent,
    stride_kept,
    stride_qkv,
    stride_residual,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_REST: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_C: tl.constexpr,
    HAS_NORM: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Rotates a tile of heads of one row, or keeps a tile of its residual stream.

    Grid (num_rows, cdiv(NUM_Q_HEADS, TILE_H) + cdiv(NUM_KV_HEADS, TILE_H) + cdiv(HIDDEN_SIZE,
    TILE_C)). A program owns one row and first TILE_H heads of q, then those of k and v, then TILE_C
    elements of the residual stream.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    Q_TILES: tl.constexpr = (NUM_Q_HEADS + TILE_H - 1) // TILE_H
    HEAD_TILES: tl.constexpr = Q_TILES + (NUM_KV_HEADS + TILE_H - 1) // TILE_H
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin(USE_PDL)
    if part >= HEAD_TILES:
        slot = tl.load(slots_ptr + row)
        kept_row_ptr = kept_ptr + slot * stride_kept
        residual_row_ptr = residual_ptr + row * stride_residual
        copy_tile(kept_row_ptr, residual_row_ptr, part - HEAD_TILES, HIDDEN_SIZE, TILE_C)
        return

    is_q = part < Q_TILES
    heads = tl.where(is_q, part, part - Q_TILES) * TILE_H + tl.arange(0, TILE_H)
    head_mask = (heads < tl.where(is_q, NUM_Q_HEADS, NUM_KV_HEADS))[:, None]
    first = tl.where(is_q, 0, NUM_Q_HEADS * HEAD_DIM)
    from_ptr = qkv_ptr + row * stride_qkv + first
    to_ptr = sent_ptr + row * stride_sent + first
    new_low, new_high, rest = rotated_heads(
        from_ptr, heads, head_mask,
        cos_sin_ptr + tl.load(positions_ptr + row) * ROTARY_DIM,
        q_weight_ptr if is_q else k_weight_ptr,
        eps, HEAD_DIM, ROTARY_DIM, TILE_H, TILE_HALF, TILE_REST, HAS_NORM,
    )  # fmt: skip
    offs_half = tl.arange(0, TILE_HALF)
    mask = head_mask & (offs_half < HALF)[None, :]
    low_ptrs = to_ptr + heads[:, None] * HEAD_DIM + offs_half[None, :]
    tl.store(low_ptrs, new_low, mask=mask)
    tl.store(low_ptrs + HALF, new_high, mask=mask)
    if ROTARY_DIM < HEAD_DIM:
        offs_rest = ROTARY_DIM + tl.arange(0, TILE_REST)
        rest_mask = head_mask & (offs_rest < HEAD_DIM)[None, :]
        tl.store(to_ptr + heads[:, None] * HEAD_DIM + offs_rest[None, :], rest, mask=rest_mask)
    if is_q:
        return
    offs_d = tl.arange(0, TILE_D)
    v_mask = head_mask & (offs_d < HEAD_DIM)[None, :]
    v_offs = (NUM_KV_HEADS + heads[:, None]) * HEAD_DIM + offs_d[None, :]
    tl.store(to_ptr + v_offs, tl.load(from_ptr + v_offs, mask=v_mask, other=0.0), mask=v_mask)


@triton.jit(do_not_specialize=["answer_ids_ptr", "slots_ptr"])
def rejoin_rows_kernel(
    out_ptr,
    residual_ptr,
    answers_ptr,
    answer_ids_ptr,
    kept_ptr,
    slots_ptr,
    stride_out,
    stride_residual,
    stride_answers,
    stride_kept,
    WIDTH: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    TILE_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Fetches a tile of one row's answer, or of its residual stream.

    Grid (num_rows, cdiv(WIDTH, TILE_C) + cdiv(HIDDEN_SIZE, TILE_C)). A program owns one row and
    TILE_C elements, first of the answer, then of the residual stream.
    """
    ANSWER_TILES: tl.constexpr = (WIDTH + TILE_C - 1) // TILE_C
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin(USE_PDL)
    if part < ANSWER_TILES:
        answer_ptr = answers_ptr + tl.load(answer_ids_ptr + row) * stride_answers
        copy_tile(out_ptr + row * stride_out, answer_ptr, part, WIDTH, TILE_C)
    else:
        kept_row_ptr = kept_ptr + tl.load(slots_ptr + row) * stride_kept
        residual_row_ptr = residual_ptr + row * stride_residual
        copy_tile(residual_row_ptr, kept_row_ptr, part - ANSWER_TILES, HIDDEN_SIZE, TILE_C)


def depart_rows(
    sent: torch.Tensor,
    kept: torch.Tensor,
    qkv: torch.Tensor,
    residual: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """Rotates q and k of rows on their way to `sent`, v beside them, and keeps their residuals.

    Arithmetic and rounding are those of `rope_store_kv`.

    Args:
        sent: [n, width], qkv's dtype, rows may be strided; overwritten with rotated q, k, and v.
        kept: [num_slots, hidden_size], qkv's dtype, rows may be strided; the listed slots are
            overwritten. Of rows with the same slot, any may be what it holds afterwards.
        qkv: [n, width], bfloat16, float16 or float32, rows may be strided: the heads of q, then
            those of k, then those of v; width is (num_q_heads + 2 * num_kv_heads) * head_dim.
        residual: [n, hidden_size], qkv's dtype, rows may be strided.
        positions: [n], int64, token index in its sequence, below max_position.
        slots: [n], int64, below num_slots.
        cos_sin_cache: [max_position, rotary_dim], float32, as for `rope_store_kv`.
        num_q_heads: Heads of q.
        num_kv_heads: Heads of k, and of v.
        q_norm_weight: [head_dim], qkv's dtype: RMSNorm of each head of q before the rotation.
        k_norm_weight: [head_dim], the same for k; both or neither.
        norm_eps: Epsilon of these norms.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    check_float("qkv", qkv, 2)
    n, width = qkv.shape
    num_heads = num_q_heads + 2 * num_kv_heads
    if num_q_heads < 1 or num_kv_heads < 1 or width % num_heads != 0:
        raise wrong("qkv width", f"a multiple of the {num_heads} heads", width)
    head_dim = width // num_heads
    check_dense_rows("qkv", qkv)
    check_tensor("sent", sent, (n, width), qkv.dtype, qkv.device)
    check_dense_rows("sent", sent)
    hidden_size = _check_kept(residual, kept, slots, n, qkv)
    check_tensor("positions", positions, (n,), torch.int64, qkv.device)
    check_contiguous("positions", positions)
    rotary_dim = check_rotary(cos_sin_cache, head_dim, qkv.device)
    has_norm = check_norm_weights(q_norm_weight, k_norm_weight, head_dim, qkv)
    if n == 0:
        return
    tiles = head_tiles(num_q_heads, head_dim, rotary_dim)
    tile_h = tiles["TILE_H"]
    tile_c = min(_TILE, next_power_of_2(hidden_size))
    parts = cdiv(num_q_heads, tile_h) + cdiv(num_kv_heads, tile_h) + cdiv(hidden_size, tile_c)
    depart_rows_kernel[(n, parts)](
        sent, kept, qkv, residual, positions, slots, cos_sin_cache,
        q_norm_weight if has_norm else qkv, k_norm_weight if has_norm else qkv, norm_eps,
        sent.stride(0), kept.stride(0), qkv.stride(0), residual.stride(0),
        NUM_Q_HEADS=num_q_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim, HIDDEN_SIZE=hidden_size, TILE_C=tile_c, HAS_NORM=has_norm,
        num_warps=2, **tiles,
        **pdl_options(qkv.device),
    )  # fmt: skip


def rejoin_rows(
    out: torch.Tensor,
    residual: torch.Tensor,
    answers: torch.Tensor,
    answer_ids: torch.Tensor,
    kept: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Fetches answers and residuals of rows that come back.

    Args:
        out: [n, width], answers' dtype, rows may be strided; overwritten.
        residual: [n, hidden_size], answers' dtype, rows may be strided; overwritten.
        answers: [num_answers, width], bfloat16, float16 or float32, rows may be strided.
        answer_ids: [n], int64, which answer is each row's.
        kept: [num_slots, hidden_size], answers' dtype, rows may be strided.
        slots: [n], int64, where in `kept` each row's residual is.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    check_float("answers", answers, 2)
    check_dense_rows("answers", answers)
    n, width = out.shape[0], answers.shape[1]
    check_tensor("out", out, (n, width), answers.dtype, answers.device)
    check_dense_rows("out", out)
    check_tensor("answer_ids", answer_ids, (n,), torch.int64, answers.device)
    check_contiguous("answer_ids", answer_ids)
    hidden_size = _check_kept(residual, kept, slots, n, answers)
    if n == 0:
        return
    tile_c = min(_TILE, next_power_of_2(max(width, hidden_size)))
    rejoin_rows_kernel[(n, cdiv(width, tile_c) + cdiv(hidden_size, tile_c))](
        out, residual, answers, answer_ids, kept, slots,
        out.stride(0), residual.stride(0), answers.stride(0), kept.stride(0),
        WIDTH=width, HIDDEN_SIZE=hidden_size, TILE_C=tile_c, num_warps=2,
        **pdl_options(answers.device),
    )  # fmt: skip


def _check_kept(
    residual: torch.Tensor, kept: torch.Tensor, slots: torch.Tensor, n: int, like: torch.Tensor
) -> int:
    """Checks residuals, where they are kept, and the slots; returns hidden_size."""
    check_tensor("residual", residual, (n, None), like.dtype, like.device)
    check_dense_rows("residual", residual)
    check_tensor("kept", kept, (None, residual.shape[1]), like.dtype, like.device)
    check_dense_rows("kept", kept)
    check_tensor("slots", slots, (n,), torch.int64, like.device)
    check_contiguous("slots", slots)
    return residual.shape[1]
