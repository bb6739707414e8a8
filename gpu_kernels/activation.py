"""SiLU of the gate times up, over the fused gate-and-up projection's output."""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import check_dense_rows, check_float, check_tensor, wrong
from gpu_kernels.pdl import begin, pdl_options
from gpu_kernels.tiles import cdiv, next_power_of_2

TILE_COLUMNS = 1024


@triton.jit
def silu_and_mul_kernel(
    out_ptr,
    gate_up_ptr,
    stride_out,
    stride_gate_up,
    INTERMEDIATE_SIZE: tl.constexpr,
    TILE_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes a tile of one output row.

    Grid (cdiv(INTERMEDIATE_SIZE, TILE_C), num_rows). A program owns TILE_C elements of one row.
    """
    row = tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    mask = offs_c < INTERMEDIATE_SIZE
    begin(USE_PDL)
    gate_ptrs = gate_up_ptr + row * stride_gate_up + offs_c
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + INTERMEDIATE_SIZE, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * stride_out + offs_c, (activated * up).to(dtype), mask=mask)


def silu_and_mul(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Computes out = silu(gate) * up; silu in float32, rounded before the product as transformers.

    Args:
        out: [num_rows, intermediate_size], gate_up's dtype, rows may be strided; overwritten.
        gate_up: [num_rows, 2 * intermediate_size], bfloat16, float16 or float32, rows may be
            strided: the gate's columns, then up's.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    check_float("gate_up", gate_up, 2)
    num_rows, width = gate_up.shape
    if width == 0 or width % 2 != 0:
        raise wrong("gate_up width", "even and positive", width)
    check_tensor("out", out, (num_rows, width // 2), gate_up.dtype, gate_up.device)
    check_dense_rows("gate_up", gate_up)
    check_dense_rows("out", out)
    if num_rows == 0:
        return
    tile_c = min(TILE_COLUMNS, next_power_of_2(width // 2))
    silu_and_mul_kernel[(cdiv(width // 2, tile_c), num_rows)](
        out, gate_up, out.stride(0), gate_up.stride(0),
        INTERMEDIATE_SIZE=width // 2, TILE_C=tile_c, num_warps=4, **pdl_options(gate_up.device),
    )  # fmt: skip
