"""The first kernel of a step: from tokens to the residual stream and its first norm.

A token may be one that the step before this one sampled and nobody on the host has seen yet: then
its place among those is given.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import check_contiguous, check_dense_rows, check_float, check_tensor, wrong
from gpu_kernels.norm import MAX_HIDDEN_SIZE, norm_warps, normalised
from gpu_kernels.pdl import begin, pdl_options
from gpu_kernels.tiles import next_power_of_2


@triton.jit(do_not_specialize=["ids_ptr", "sources_ptr", "sampled_ptr"])
def embed_rows_kernel(
    out_ptr,
    residual_ptr,
    ids_ptr,
    sources_ptr,
    sampled_ptr,
    table_ptr,
    weight_ptr,
    eps,
    stride_out,
    stride_residual,
    HIDDEN_SIZE: tl.constexpr,
    TILE_C: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Looks up one row's embedding and normalises it.

    Grid (num_rows,). A program owns one row of HIDDEN_SIZE elements.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, TILE_C)
    mask = offs_c < HIDDEN_SIZE
    weight = tl.load(weight_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    begin(USE_PDL)
    token = tl.load(ids_ptr + row)
    if HAS_SOURCES:
        source = tl.load(sources_ptr + row)
        token = tl.load(sampled_ptr + source, mask=source >= 0, other=token)
    x = tl.load(table_ptr + token * HIDDEN_SIZE + offs_c, mask=mask, other=0.0)
    tl.store(residual_ptr + row * stride_residual + offs_c, x, mask=mask)
    out = normalised(x.to(tl.float32), weight, eps, HIDDEN_SIZE, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_out + offs_c, out, mask=mask)


def embed_rows(
    out: torch.Tensor,
    residual: torch.Tensor,
    input_ids: torch.Tensor,
    sources: torch.Tensor | None,
    sampled: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> None:
    """Writes tokens' embeddings to the residual and their RMSNorm to out.

    Args:
        out: [num_rows, hidden_size], the table's dtype, rows may be strided; overwritten.
        residual: Like out.
        input_ids: [num_rows], int64, contiguous; ids in the table.
        sources: [num_rows], int64, contiguous; where not negative, the token is that element of
            sampled instead. None: nowhere.
        sampled: [any], int64, contiguous; ids in the table.
        table: [vocab_size, hidden_size], bfloat16, float16 or float32, contiguous.
        weight: [hidden_size], the table's dtype.
        eps: Added to the mean square.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    check_float("table", table, 2)
    check_contiguous("table", table)
    hidden_size, device = table.shape[1], table.device
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise wrong("table hidden_size", f"1 to {MAX_HIDDEN_SIZE}", hidden_size)
    num_rows = input_ids.shape[0]
    for name, ids in (("input_ids", input_ids), ("sources", sources), ("sampled", sampled)):
        if ids is not None:
            check_tensor(name, ids, (None if name == "sampled" else num_rows,), torch.int64, device)
            check_contiguous(name, ids)
    for name, rows in (("out", out), ("residual", residual)):
        check_tensor(name, rows, (num_rows, hidden_size), table.dtype, device)
        check_dense_rows(name, rows)
    check_tensor("weight", weight, (hidden_size,), table.dtype, device)
    check_contiguous("weight", weight)
    if num_rows == 0:
        return
    tile_c = next_power_of_2(hidden_size)
    embed_rows_kernel[(num_rows,)](
        out, residual, input_ids, input_ids if sources is None else sources, sampled, table,
        weight, eps, out.stride(0), residual.stride(0),
        HIDDEN_SIZE=hidden_size, TILE_C=tile_c, HAS_SOURCES=sources is not None,
        num_warps=norm_warps(tile_c), **pdl_options(device),
    )  # fmt: skip
