"""Programmatic dependent launch: a kernel's blocks start while the one before it still finishes.

A kernel that takes part is launched with `pdl_options` and, before it touches anything an earlier
kernel wrote or reads, calls `begin`. What it does before that (addresses, weights) overlaps the end
of the kernel before it.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LEAST_CAPABILITY = (9, 0)
ELEMENTS_OF_A_LINE: tl.constexpr = tl.constexpr(64)
"""16-bit elements of a line of the L2 cache, 128 bytes."""


@triton.jit
def begin(USE_PDL: tl.constexpr):
    """Lets the next kernel's blocks start, and waits until all earlier kernels are done."""
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch_rows(
    ptr,
    stride_row,
    NUM_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Asks for rows of 16-bit elements to be brought into the L2 cache; only before `begin`.

    Memory would otherwise be idle while this kernel waits for the one before it.
    """
    if USE_PDL and NUM_COLUMNS > 0:
        offs_row = tl.arange(0, NUM_ROWS)
        offs_line = tl.arange(0, NUM_COLUMNS // ELEMENTS_OF_A_LINE) * ELEMENTS_OF_A_LINE
        ptrs = ptr + offs_row[:, None].to(tl.int64) * stride_row + offs_line[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [ptrs],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@cache
def pdl_options(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that takes part, for a device; a mapping not to be changed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return {"USE_PDL": False}
    return {"USE_PDL": True, "launch_pdl": True}
