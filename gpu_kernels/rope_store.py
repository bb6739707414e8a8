"""Rotary position embedding of q and k, and the store of k and v into the device pool, in one pass.

Optionally normalises each head of q and k before the rotation (Qwen3). The cos/sin table is made
elsewhere: scaling schemes differ by model and cost nothing once tabulated.
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
    check_pool,
    check_tensor,
    wrong,
)
from gpu_kernels.pdl import begin, pdl_options
from gpu_kernels.tiles import cdiv, next_power_of_2

TILE_HEADS = 8


@triton.jit
def norm_scale(low, high, rest, eps, HEAD_DIM: tl.constexpr):
    """Returns 1 / RMS of each head's row, given as two rotated halves and the rest, [TILE_H, 1]."""
    square_sum = tl.sum(low * low, 1) + tl.sum(high * high, 1) + tl.sum(rest * rest, 1)
    return tl.div_rn(1.0, tl.sqrt_rn(square_sum / HEAD_DIM + eps))[:, None]


@triton.jit
def rotated_heads(
    base_ptr,
    heads,
    head_mask,
    table_ptr,
    weight_ptr,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Returns a tile of heads of one token, normalised and rotated, in its own dtype.

    Three parts: two rotated halves, [TILE_H, TILE_HALF], and what is not rotated of each head,
    [TILE_H, TILE_REST]. `table_ptr` is where the token's cosines begin, sines behind them.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    offs_half = tl.arange(0, TILE_HALF)
    offs_rest = ROTARY_DIM + tl.arange(0, TILE_REST)
    half_mask = offs_half < HALF
    rest_mask = offs_rest < HEAD_DIM
    low_ptrs = base_ptr + heads[:, None] * HEAD_DIM + offs_half[None, :]
    rest_ptrs = base_ptr + heads[:, None] * HEAD_DIM + offs_rest[None, :]
    mask = head_mask & half_mask[None, :]
    low = tl.load(low_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(low_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    if ROTARY_DIM < HEAD_DIM:
        rest = tl.load(rest_ptrs, mask=head_mask & rest_mask[None, :], other=0.0).to(tl.float32)
    else:
        rest = tl.zeros([TILE_H, TILE_REST], dtype=tl.float32)

    dtype = base_ptr.dtype.element_ty
    if HAS_NORM:
        scale = norm_scale(low, high, rest, eps, HEAD_DIM)
        w_low = tl.load(weight_ptr + offs_half, mask=half_mask, other=0.0).to(tl.float32)
        w_high = tl.load(weight_ptr + HALF + offs_half, mask=half_mask, other=0.0).to(tl.float32)
        low = ((low * scale).to(dtype).to(tl.float32) * w_low[None, :]).to(dtype).to(tl.float32)
        high = ((high * scale).to(dtype).to(tl.float32) * w_high[None, :]).to(dtype).to(tl.float32)
        if ROTARY_DIM < HEAD_DIM:
            w_rest = tl.load(weight_ptr + offs_rest, mask=rest_mask, other=0.0).to(tl.float32)
            rest = (rest * scale).to(dtype).to(tl.float32) * w_rest[None, :]

    cos = tl.load(table_ptr + offs_half, mask=half_mask, other=0.0)[None, :]
    sin = tl.load(table_ptr + HALF + offs_half, mask=half_mask, other=0.0)[None, :]
    new_low = (low * cos - high * sin).to(dtype)
    new_high = (high * cos + low * sin).to(dtype)
    return new_low, new_high, rest.to(dtype)


@triton.jit(do_not_specialize=["positions_ptr", "slot_mapping_ptr"])
def rope_store_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    stride_q,
    stride_k,
    stride_v,
    stride_block,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_REST: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Rotates a tile of heads of one token; a tile of KV heads is stored into the pool as well.

    Grid (num_tokens, cdiv(NUM_Q_HEADS, TILE_H) + cdiv(NUM_KV_HEADS, TILE_H)). A program owns one
    token and TILE_H heads, first those of q, then those of k and v.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    Q_TILES: tl.constexpr = (NUM_Q_HEADS + TILE_H - 1) // TILE_H
    token = tl.program_id(0).to(tl.int64)
    head_tile = tl.program_id(1)
    is_q = head_tile < Q_TILES
    heads = tl.where(is_q, head_tile, head_tile - Q_TILES) * TILE_H + tl.arange(0, TILE_H)
    head_mask = (heads < tl.where(is_q, NUM_Q_HEADS, NUM_KV_HEADS))[:, None]
    base_ptr = q_ptr + token * stride_q if is_q else k_ptr + token * stride_k

    offs_half = tl.arange(0, TILE_HALF)
    offs_rest = ROTARY_DIM + tl.arange(0, TILE_REST)
    mask = head_mask & (offs_half < HALF)[None, :]
    rest_mask = head_mask & (offs_rest < HEAD_DIM)[None, :]
    begin(USE_PDL)
    low_ptrs = base_ptr + heads[:, None] * HEAD_DIM + offs_half[None, :]
    rest_ptrs = base_ptr + heads[:, None] * HEAD_DIM + offs_rest[None, :]
    new_low, new_high, rest = rotated_heads(
        base_ptr, heads, head_mask,
        cos_sin_ptr + tl.load(positions_ptr + token) * ROTARY_DIM,
        q_weight_ptr if is_q else k_weight_ptr,
        eps, HEAD_DIM, ROTARY_DIM, TILE_H, TILE_HALF, TILE_REST, HAS_NORM,
    )  # fmt: skip
    tl.store(low_ptrs, new_low, mask=mask)
    tl.store(low_ptrs + HALF, new_high, mask=mask)
    if HAS_NORM and ROTARY_DIM < HEAD_DIM:
        tl.store(rest_ptrs, rest, mask=rest_mask)
    if is_q:
        return
    slot = tl.load(slot_mapping_ptr + token)
    if slot < 0:
        return
    row_offs = (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * HEAD_DIM
    cache_offs = row_offs + heads[:, None] * (BLOCK_SIZE * HEAD_DIM)
    k_cache_ptrs = k_cache_ptr + cache_offs + offs_half[None, :]
    tl.store(k_cache_ptrs, new_low, mask=mask)
    tl.store(k_cache_ptrs + HALF, new_high, mask=mask)
    if ROTARY_DIM < HEAD_DIM:
        rest_cache_ptrs = k_cache_ptr + cache_offs + offs_rest[None, :]
        tl.store(rest_cache_ptrs, rest, mask=rest_mask)
    offs_d = tl.arange(0, TILE_D)
    v_mask = head_mask & (offs_d < HEAD_DIM)[None, :]
    v_ptrs = v_ptr + token * stride_v + heads[:, None] * HEAD_DIM + offs_d[None, :]
    v = tl.load(v_ptrs, mask=v_mask, other=0.0)
    tl.store(v_cache_ptr + cache_offs + offs_d[None, :], v, mask=v_mask)


def rope_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """Rotates q and k in place (rotate-half, NeoX style) and stores k and v into the pool.

    Arithmetic is float32; results are rounded once to q's dtype (with norms: after the norm, after
    its weight and after the rotation, as transformers rounds). A row with a negative slot is
    rotated but not stored: its K and V go elsewhere, or it is padding.

    Args:
        q: [num_tokens, num_q_heads, head_dim], bfloat16, float16 or float32, rows may be strided;
            overwritten.
        k: [num_tokens, num_kv_heads, head_dim], q's dtype, rows may be strided; overwritten.
        v: Like k; only read.
        positions: [num_tokens], int64, token index in its sequence, below max_position.
        cos_sin_cache: [max_position, rotary_dim], float32: cosines, then sines, of the
            rotary_dim / 2 frequencies; rotary_dim is even and at most head_dim, elements beyond
            it pass unrotated.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], q's dtype; one layer's pool.
        v_cache: Like k_cache.
        slot_mapping: [num_tokens], int64, block * block_size + offset; negative: do not store.
        q_norm_weight: [head_dim], q's dtype: RMSNorm of each head of q before the rotation.
        k_norm_weight: [head_dim], the same for k; both or neither.
        norm_eps: Epsilon of these norms.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    check_float("q", q, 3)
    num_tokens, num_q_heads, head_dim = q.shape
    check_tensor("k", k, (num_tokens, None, head_dim), q.dtype, q.device)
    num_kv_heads = k.shape[1]
    check_tensor("v", v, k.shape, q.dtype, q.device)
    check_dense_rows("q", q)
    check_dense_rows("k", k)
    check_dense_rows("v", v)
    check_tensor("positions", positions, (num_tokens,), torch.int64, q.device)
    check_contiguous("positions", positions)
    check_contiguous("slot_mapping", slot_mapping)
    rotary_dim = check_rotary(cos_sin_cache, head_dim, q.device)
    block_size = check_pool(k_cache, v_cache, num_kv_heads, head_dim, q)
    check_tensor("slot_mapping", slot_mapping, (num_tokens,), torch.int64, q.device)
    has_norm = check_norm_weights(q_norm_weight, k_norm_weight, head_dim, q)
    if num_tokens == 0:
        return
    tiles = head_tiles(num_q_heads, head_dim, rotary_dim)
    num_tiles = cdiv(num_q_heads, tiles["TILE_H"]) + cdiv(num_kv_heads, tiles["TILE_H"])
    rope_store_kernel[(num_tokens, num_tiles)](
        q, k, v, positions, cos_sin_cache, k_cache, v_cache, slot_mapping,
        q_norm_weight if has_norm else q, k_norm_weight if has_norm else q, norm_eps,
        q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0),
        NUM_Q_HEADS=num_q_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim, BLOCK_SIZE=block_size, HAS_NORM=has_norm, num_warps=2, **tiles,
        **pdl_options(q.device),
    )  # fmt: skip


def head_tiles(num_q_heads: int, head_dim: int, rotary_dim: int) -> dict[str, int]:
    """Returns the tiles of kernels that call `rotated_heads`: heads, halves, rest, whole heads."""
    return {
        "TILE_H": min(TILE_HEADS, next_power_of_2(num_q_heads)),
        "TILE_HALF": next_power_of_2(rotary_dim // 2),
        "TILE_REST": next_power_of_2(max(1, head_dim - rotary_dim)),
        "TILE_D": next_power_of_2(head_dim),
    }


def check_rotary(cos_sin_cache: torch.Tensor, head_dim: int, device: torch.device) -> int:
    """Checks a table of cosines and sines and returns rotary_dim.

    Raises:
        ValueError: Its shape, dtype, stride or device is wrong.
    """
    check_tensor("cos_sin_cache", cos_sin_cache, (None, None), torch.float32, device)
    check_contiguous("cos_sin_cache", cos_sin_cache)
    rotary_dim = cos_sin_cache.shape[1]
    if rotary_dim % 2 != 0 or not 2 <= rotary_dim <= head_dim:
        raise wrong("cos_sin_cache rotary_dim", f"even, 2 to {head_dim}", rotary_dim)
    return rotary_dim


def check_norm_weights(
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    head_dim: int,
    like: torch.Tensor,
) -> bool:
    """Checks the weights of norms on heads and returns whether there are any.

    Raises:
        ValueError: There is only one, or its shape, dtype or device is wrong.
    """
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise wrong("k_norm_weight", "both norm weights or neither", "only one")
    if q_norm_weight is None or k_norm_weight is None:
        return False
    check_tensor("q_norm_weight", q_norm_weight, (head_dim,), like.dtype, like.device)
    check_tensor("k_norm_weight", k_norm_weight, (head_dim,), like.dtype, like.device)
    return True
