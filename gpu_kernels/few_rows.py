"""Linear layers of a few rows: bound by reading the weights once, which cuBLAS falls short of.

Weights are the left operand, so that their rows fill the matrix units and the few rows of input
are the narrow side. Long sums are cut into splits that run side by side; the last one to finish
adds up the others' partial results in a fixed order, so that results repeat bit for bit and no
second kernel is needed. The gate-and-up projection applies SiLU and the product before anything is
written.

An RMSNorm between two such layers needs no kernel either. The first adds its output to the residual
stream, scales by the norm's weight, and leaves the sums of squares of what its column tiles added
up; the second divides its results by the root of their mean, which is one number a row.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import check_contiguous, check_dense_rows, check_float, check_tensor, wrong
from gpu_kernels.pdl import begin, pdl_options, prefetch_rows
from gpu_kernels.tiles import next_power_of_2, num_multiprocessors

MAX_ROWS = 32
"""Beyond, cuBLAS is as fast: 64 rows of an 8B layer took 159 µs here and 123 µs there (H200)."""
TILE_N = 64
TILE_K = 128
GATED_TILE_K = 64
MAX_SPLITS = 8
MAX_PREFETCH = 128
"""Columns. More fetches what the kernels in between would have had the memory for (H200, decode
step of 24 rows: 0, 128, 256, 512 columns took 5.50, 5.43, 5.50, 5.55 ms)."""
_MIN_PROGRAMS = 192
"""So many fit a large GPU at once, with a second one on half of its multiprocessors. QKV of an 8B
layer as 192 programs instead of 384, which do not all fit: 5.23 ms a step instead of 5.30."""
_BYTES_IN_FLIGHT = 8 * 2**20
"""So many of the weights, over all programs, keep the memory of a large GPU busy. Of Llama-2-7B,
192 programs of QKV reach 3.5 TB/s with 6 MiB and 3.8 with 8, 128 of down 3.3 with 4 and 3.9 with 8
(H200)."""
_SHARED_BYTES = 227 * 2**10
MAX_STAGES = 6
NUM_COUNTERS = _MIN_PROGRAMS
"""Sums are split only where there are fewer column tiles than this."""


@triton.jit
def load_squares(
    ptr,
    num_rows,
    NUM_PARTS: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """Loads the sums of squares that `skinny_linear_add_norm` left, [TILE_PARTS, TILE_M]."""
    offs_p = tl.arange(0, TILE_PARTS)
    offs_m = tl.arange(0, TILE_M)
    mask = (offs_p < NUM_PARTS)[:, None] & (offs_m < num_rows)[None, :]
    return tl.load(ptr + offs_p[:, None] * num_rows + offs_m[None, :], mask=mask, other=0.0)


@triton.jit
def norm_scale(squares, eps, NUM_ELEMENTS: tl.constexpr):
    """Returns what the rows' RMSNorm multiplies them with, [TILE_M]."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) / NUM_ELEMENTS + eps))


@triton.jit(do_not_specialize=["num_rows"])
def skinny_linear_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    counter_ptr,
    squares_in_ptr,
    residual_ptr,
    norm_weight_ptr,
    squares_out_ptr,
    eps,
    num_rows,
    stride_out,
    stride_x,
    stride_residual,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    ADD_NORM: tl.constexpr,
    PREFETCH: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes TILE_N columns of all rows, over one split of K.

    Grid (N / TILE_N, NUM_SPLITS). A program owns TILE_N rows of the weight and K / NUM_SPLITS of
    its columns. The last program of a column tile to finish writes the sum of all splits. With
    NUM_PARTS, x still lacks the scale of its norm, of whose sums of squares there are so many a
    row. With ADD_NORM, the result is added to the residual and what is written is the sum, scaled
    by the weight of the next norm, and the sum of its squares.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    offs_n = tile * TILE_N + tl.arange(0, TILE_N)
    offs_m = tl.arange(0, TILE_M)
    offs_k = split * (K // NUM_SPLITS) + tl.arange(0, TILE_K)
    weight_ptrs = weight_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    x_ptrs = x_ptr + offs_m[None, :] * stride_x + offs_k[:, None]
    row_mask = (offs_m < num_rows)[None, :]
    # The first weights are on their way while the kernel before this one still runs.
    weight = tl.load(weight_ptrs, eviction_policy="evict_first")
    ahead_ptr = weight_ptr + (tile * TILE_N).to(tl.int64) * K + split * (K // NUM_SPLITS) + TILE_K
    prefetch_rows(ahead_ptr, K, TILE_N, PREFETCH, USE_PDL)
    begin(USE_PDL)
    if NUM_PARTS > 0:
        squares = load_squares(squares_in_ptr, num_rows, NUM_PARTS, TILE_PARTS, TILE_M)
    x = tl.load(x_ptrs, mask=row_mask, other=0.0)
    acc = tl.dot(weight, x, input_precision="ieee")
    for k in range(TILE_K, K // NUM_SPLITS, TILE_K):
        weight = tl.load(weight_ptrs + k, eviction_policy="evict_first")
        x = tl.load(x_ptrs + k, mask=row_mask, other=0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")

    if NUM_SPLITS > 1:
        partial_ptrs = partial_ptr + offs_m[None, :] * N + offs_n[:, None]
        tl.store(partial_ptrs + split * num_rows * N, acc, mask=row_mask)
        tl.debug_barrier()
        num_done = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if num_done < NUM_SPLITS - 1:
            return
        tl.store(counter_ptr + tile, 0)
        acc = tl.zeros([TILE_N, TILE_M], dtype=tl.float32)
        for other in tl.static_range(NUM_SPLITS):
            acc += tl.load(
                partial_ptrs + other * num_rows * N, mask=row_mask, other=0.0, cache_modifier=".cg"
            )
    if NUM_PARTS > 0:
        acc *= norm_scale(squares, eps, K)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
    dtype = out_ptr.dtype.element_ty
    if ADD_NORM:
        residual_ptrs = residual_ptr + offs_m[None, :] * stride_residual + offs_n[:, None]
        residual = tl.load(residual_ptrs, mask=row_mask, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + offs_n).to(tl.float32)
        total = (acc.to(dtype).to(tl.float32) + residual).to(dtype)
        tl.store(residual_ptrs, total, mask=row_mask)
        acc = total.to(tl.float32)
        squares_ptrs = squares_out_ptr + tile * num_rows + offs_m
        tl.store(squares_ptrs, tl.sum(acc * acc, 0), mask=offs_m < num_rows)
        acc *= norm_weight[:, None]
    out_ptrs = out_ptr + offs_m[None, :] * stride_out + offs_n[:, None]
    tl.store(out_ptrs, acc.to(dtype), mask=row_mask)


@triton.jit(do_not_specialize=["num_rows"])
def skinny_gated_linear_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    squares_in_ptr,
    eps,
    num_rows,
    stride_out,
    stride_x,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    PREFETCH: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes TILE_N columns of silu(gate) * up for all rows.

    Grid (N / TILE_N,). A program owns TILE_N rows of the gate's weight and the same of up's, which
    are N rows further down. NUM_PARTS is as in `skinny_linear_kernel`.
    """
    offs_n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    offs_m = tl.arange(0, TILE_M)
    offs_k = tl.arange(0, TILE_K)
    gate_ptrs = weight_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    up_ptrs = gate_ptrs + N * K
    x_ptrs = x_ptr + offs_m[None, :] * stride_x + offs_k[:, None]
    row_mask = (offs_m < num_rows)[None, :]
    gate_weight = tl.load(gate_ptrs, eviction_policy="evict_first")
    up_weight = tl.load(up_ptrs, eviction_policy="evict_first")
    ahead_ptr = weight_ptr + (tl.program_id(0) * TILE_N).to(tl.int64) * K + TILE_K
    prefetch_rows(ahead_ptr, K, TILE_N, PREFETCH, USE_PDL)
    prefetch_rows(ahead_ptr + N * K, K, TILE_N, PREFETCH, USE_PDL)
    begin(USE_PDL)
    if NUM_PARTS > 0:
        squares = load_squares(squares_in_ptr, num_rows, NUM_PARTS, TILE_PARTS, TILE_M)
    x = tl.load(x_ptrs, mask=row_mask, other=0.0)
    gate = tl.dot(gate_weight, x, input_precision="ieee")
    up = tl.dot(up_weight, x, input_precision="ieee")
    for k in range(TILE_K, K, TILE_K):
        gate_weight = tl.load(gate_ptrs + k, eviction_policy="evict_first")
        up_weight = tl.load(up_ptrs + k, eviction_policy="evict_first")
        x = tl.load(x_ptrs + k, mask=row_mask, other=0.0)
        gate = tl.dot(gate_weight, x, gate, input_precision="ieee")
        up = tl.dot(up_weight, x, up, input_precision="ieee")
    if NUM_PARTS > 0:
        scale = norm_scale(squares, eps, K)
        gate *= scale[None, :]
        up *= scale[None, :]
    if HAS_BIAS:
        gate += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + N + offs_n).to(tl.float32)[:, None]
    dtype = out_ptr.dtype.element_ty
    gate = gate.to(dtype).to(tl.float32)
    up = up.to(dtype).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    out_ptrs = out_ptr + offs_m[None, :] * stride_out + offs_n[:, None]
    tl.store(out_ptrs, (activated * up).to(dtype), mask=row_mask)


def can_skinny_linear(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether the kernels here take a weight and so many rows."""
    n, k = weight.shape
    return (
        0 < num_rows <= MAX_ROWS
        and weight.dtype in (torch.bfloat16, torch.float16)
        and n % (2 * TILE_N) == 0
        and k % (num_splits(n, k) * TILE_K) == 0
    )


@cache
def num_splits(n: int, k: int) -> int:
    """Into how many splits the sum over k is cut, so that programs fill a large GPU."""
    splits = 1
    while (
        splits < MAX_SPLITS
        and n // TILE_N * splits < _MIN_PROGRAMS
        and k % (2 * splits * TILE_K) == 0
    ):
        splits *= 2
    return splits


@cache
def num_stages(num_programs: int, tile_m: int, num_sms: int) -> int:
    """Into how many stages a program's loop is cut, so that enough bytes are on their way.

    Args:
        num_programs: All of which shall fit the GPU at once.
        tile_m: Rows of input, padded.
        num_sms: Multiprocessors of the GPU.
    """
    weight_bytes, x_bytes = 2 * TILE_N * TILE_K, 2 * tile_m * TILE_K
    wanted = 1 + -(-_BYTES_IN_FLIGHT // (num_programs * weight_bytes))
    shared_bytes = _SHARED_BYTES // -(-num_programs // num_sms)
    fitting = shared_bytes // (weight_bytes + x_bytes) - 1  # the compiler adds a buffer
    return max(3, min(wanted, fitting, MAX_STAGES))


@dataclass(frozen=True, slots=True)
class OpenNorm:
    """What rows lack that an RMSNorm has scaled by its weight only.

    Args:
        squares: [num_parts, num_rows], float32, contiguous; sums of the squares of parts of each
            row, which together are all of it.
        eps: Added to the mean square.
    """

    squares: torch.Tensor
    eps: float


def skinny_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    open_norm: OpenNorm | None = None,
) -> None:
    """Computes out = x @ weight.T + bias with float32 sums.

    Args:
        out: [num_rows, n], x's dtype, rows may be strided; overwritten.
        x: [num_rows, k], bfloat16 or float16, 1 to 32 rows, which may be strided.
        weight: [n, k], x's dtype, contiguous; see `can_skinny_linear` for its sizes.
        bias: [n], x's dtype; None for none.
        counters: [NUM_COUNTERS], int32, all zero before and after: counts the finished splits of
            each column tile. Calls that may overlap need counters of their own.
        open_norm: Given, x is divided by the root of its mean square first.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    num_rows = _check(out, x, weight, bias, weight.shape[0])
    check_tensor("counters", counters, (NUM_COUNTERS,), torch.int32, x.device)
    _check_open_norm(open_norm, x)
    if num_rows:
        _launch(out, x, weight, bias, counters, open_norm, None)


def skinny_linear_add_norm(
    out: torch.Tensor,
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    counters: torch.Tensor,
) -> OpenNorm:
    """Adds x @ weight.T + bias to the residual, and scales the sum by the weight of a norm.

    Rounds the layer's output and the sum as the separate kernels do, but the normalised rows once
    instead of twice: out is residual * norm_weight. (In float16, large residuals may overflow there
    that would not have overflowed normalised.)

    Args:
        out: [num_rows, n], x's dtype, rows may be strided; overwritten.
        residual: [num_rows, n], x's dtype, rows may be strided; becomes residual + output.
        x: As of `skinny_linear`, like weight, bias and counters.
        weight: [n, k].
        bias: [n] or None.
        norm_weight: [n], x's dtype.
        eps: Of the norm.
        counters: [NUM_COUNTERS].

    Returns:
        What out lacks, to be given to the layer that reads it.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    num_rows = _check(out, x, weight, bias, weight.shape[0])
    check_tensor("counters", counters, (NUM_COUNTERS,), torch.int32, x.device)
    check_tensor("residual", residual, out.shape, x.dtype, x.device)
    check_dense_rows("residual", residual)
    check_tensor("norm_weight", norm_weight, (weight.shape[0],), x.dtype, x.device)
    check_contiguous("norm_weight", norm_weight)
    squares = x.new_empty(weight.shape[0] // TILE_N, num_rows, dtype=torch.float32)
    if num_rows:
        _launch(out, x, weight, bias, counters, None, (residual, norm_weight, squares))
    return OpenNorm(squares, eps)


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    open_norm: OpenNorm | None,
    add_norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> None:
    """Launches the kernel; `add_norm` is residual, weight of the norm and sums of squares."""
    num_rows, (n, k) = x.shape[0], weight.shape
    splits = num_splits(n, k)
    partial = x.new_empty(splits * num_rows * n, dtype=torch.float32) if splits > 1 else x
    residual, norm_weight, squares_out = add_norm or (out, weight, x)
    tile_m, num_programs = max(16, next_power_of_2(num_rows)), n // TILE_N * splits
    stages = num_stages(num_programs, tile_m, num_multiprocessors(x.device))
    skinny_linear_kernel[(n // TILE_N, splits)](
        out, x, weight, weight if bias is None else bias, partial, counters,
        x if open_norm is None else open_norm.squares, residual, norm_weight, squares_out,
        0.0 if open_norm is None else open_norm.eps, num_rows,
        out.stride(0), x.stride(0), residual.stride(0),
        N=n, K=k, TILE_M=tile_m, TILE_N=TILE_N, TILE_K=TILE_K,
        NUM_SPLITS=splits, HAS_BIAS=bias is not None, **_parts(open_norm),
        ADD_NORM=add_norm is not None, PREFETCH=_prefetch(k // splits - TILE_K),
        num_warps=4, num_stages=stages, **pdl_options(x.device),
    )  # fmt: skip


def skinny_gated_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    open_norm: OpenNorm | None = None,
) -> None:
    """Computes out = silu(gate) * up, where gate and up are the halves of x @ weight.T + bias.

    Rounds where the separate kernels do: gate, up, the activation and the product.

    Args:
        out: [num_rows, n / 2], x's dtype, rows may be strided; overwritten.
        x: [num_rows, k], bfloat16 or float16, 1 to 32 rows, which may be strided.
        weight: [n, k], x's dtype, contiguous: the gate's rows, then up's.
        bias: [n], x's dtype; None for none.
        open_norm: Given, x is divided by the root of its mean square first.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    num_rows = _check(out, x, weight, bias, weight.shape[0] // 2)
    _check_open_norm(open_norm, x)
    if num_rows == 0:
        return
    n, k = weight.shape[0] // 2, weight.shape[1]
    skinny_gated_linear_kernel[(n // TILE_N,)](
        out, x, weight, weight if bias is None else bias,
        x if open_norm is None else open_norm.squares,
        0.0 if open_norm is None else open_norm.eps, num_rows, out.stride(0), x.stride(0),
        N=n, K=k, TILE_M=max(16, next_power_of_2(num_rows)), TILE_N=TILE_N, TILE_K=GATED_TILE_K,
        HAS_BIAS=bias is not None, **_parts(open_norm),
        PREFETCH=_prefetch(k - GATED_TILE_K) // 2,
        num_warps=4, num_stages=3, **pdl_options(x.device),
    )  # fmt: skip


def _parts(open_norm: OpenNorm | None) -> dict[str, int]:
    """Returns the kernels' options for the sums of squares of x."""
    num_parts = 0 if open_norm is None else open_norm.squares.shape[0]
    return {"NUM_PARTS": num_parts, "TILE_PARTS": next_power_of_2(max(1, num_parts))}


def _check_open_norm(open_norm: OpenNorm | None, x: torch.Tensor) -> None:
    if open_norm is not None:
        check_tensor("squares", open_norm.squares, (None, x.shape[0]), torch.float32, x.device)
        check_contiguous("squares", open_norm.squares)


def _prefetch(num_columns: int) -> int:
    """Returns how many of the columns behind the first tile are prefetched, a power of two or 0."""
    return min(MAX_PREFETCH, 1 << (num_columns.bit_length() - 1)) if num_columns >= 128 else 0


def _check(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, width: int
) -> int:
    """Checks the arguments of either launcher and returns the number of rows."""
    check_float("x", x, 2)
    num_rows, k = x.shape
    check_dense_rows("x", x)
    check_tensor("weight", weight, (None, k), x.dtype, x.device)
    check_contiguous("weight", weight)
    if num_rows and not can_skinny_linear(num_rows, weight):
        expected = f"1 to {MAX_ROWS} rows of 16 bits an element, sizes that tiles divide"
        raise wrong("x and weight", expected, (tuple(x.shape), tuple(weight.shape), x.dtype))
    check_tensor("out", out, (num_rows, width), x.dtype, x.device)
    check_dense_rows("out", out)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x.dtype, x.device)
        check_contiguous("bias", bias)
    return num_rows
