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


@triton.jit
def begin(USE_PDL: tl.constexpr):
    """Lets the next kernel's blocks start, and waits until all earlier kernels are done."""
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()


@cache
def pdl_options(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that takes part, for a device; a mapping not to be changed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return {"USE_PDL": False}
    return {"USE_PDL": True, "launch_pdl": True}
