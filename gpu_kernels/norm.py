"""RMSNorm, alone and fused with the residual addition before it.

Rounds where transformers' Llama rounds: the sum to the tensor's dtype, the normalised value to that
dtype before the weight, the product again.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import check_contiguous, check_dense_rows, check_float, check_tensor, wrong
from gpu_kernels.pdl import begin, pdl_options
from gpu_kernels.tiles import next_power_of_2

MAX_HIDDEN_SIZE = 16384


@triton.jit
def normalised(x, weight, eps, HIDDEN_SIZE: tl.constexpr, dtype: tl.constexpr):
    """Returns a row behind its norm; what is beyond HIDDEN_SIZE must be 0."""
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / HIDDEN_SIZE + eps))
    normed = (x * scale).to(dtype).to(tl.float32)
    return (normed * weight).to(dtype)


@triton.jit
def rms_norm_kernel(
    out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    eps,
    stride_out,
    stride_x,
    stride_residual,
    HIDDEN_SIZE: tl.constexpr,
    TILE_C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Normalises one row; with HAS_RESIDUAL adds x to the residual first and normalises the sum.

    Grid (num_rows,). A program owns one row of HIDDEN_SIZE elements.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, TILE_C)
    mask = offs_c < HIDDEN_SIZE
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    begin(USE_PDL)
    x = tl.load(x_ptr + row * stride_x + offs_c, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * stride_residual + offs_c
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        total = x.to(dtype)
        tl.store(residual_ptrs, total, mask=mask)
        x = total.to(tl.float32)
    out = normalised(x, weight, eps, HIDDEN_SIZE, dtype)
    tl.store(out_ptr + row * stride_out + offs_c, out, mask=mask)


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Computes out = x / sqrt(mean(x²) + eps) * weight for each row; the mean is float32.

    Args:
        out: [num_rows, hidden_size], x's dtype, rows may be strided; overwritten; may be x.
        x: [num_rows, hidden_size], bfloat16, float16 or float32, rows may be strided.
        weight: [hidden_size], x's dtype.
        eps: Added to the mean square.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    _launch(out, x, None, weight, eps)


def add_rms_norm(
    out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """Adds x to the residual in place, then computes out = rms_norm(residual).

    Args:
        out: [num_rows, hidden_size], x's dtype, rows may be strided; overwritten; may be x.
        x: [num_rows, hidden_size], bfloat16, float16 or float32, rows may be strided.
        residual: [num_rows, hidden_size], x's dtype, rows may be strided; becomes residual + x.
        weight: [hidden_size], x's dtype.
        eps: Added to the mean square.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    _launch(out, x, residual, weight, eps)


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> None:
    """Checks the arguments of either norm and launches the kernel."""
    check_float("x", x, 2)
    num_rows, hidden_size = x.shape
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise wrong("x hidden_size", f"1 to {MAX_HIDDEN_SIZE}", hidden_size)
    check_dense_rows("x", x)
    check_tensor("out", out, x.shape, x.dtype, x.device)
    check_dense_rows("out", out)
    check_tensor("weight", weight, (hidden_size,), x.dtype, x.device)
    check_contiguous("weight", weight)
    if residual is not None:
        check_tensor("residual", residual, x.shape, x.dtype, x.device)
        check_dense_rows("residual", residual)
    if num_rows == 0:
        return
    tile_c = next_power_of_2(hidden_size)
    second = x if residual is None else residual
    rms_norm_kernel[(num_rows,)](
        out, x, second, weight, eps, out.stride(0), x.stride(0), second.stride(0),
        HIDDEN_SIZE=hidden_size, TILE_C=tile_c, HAS_RESIDUAL=residual is not None,
        num_warps=norm_warps(tile_c), **pdl_options(x.device),
    )  # fmt: skip


def norm_warps(tile_c: int) -> int:
    """Warps of a program that normalises a row of so many elements, padding included."""
    return min(16, max(1, tile_c // 512))
