"""Linear layers: NEO's kernels for a few rows in CUDA graphs, cuBLAS for all others.

Launched one by one, NEO's kernels cost more of the host's time than they save of the device's.
"""

import torch
import torch.nn.functional as F

from gpu_kernels.activation import silu_and_mul
from gpu_kernels.few_rows import (
    NUM_COUNTERS,
    can_skinny_linear,
    skinny_gated_linear,
    skinny_linear,
)
from gpu_kernels.pdl import pdl_options
from gpu_kernels.tiles import gpu_class


class LinearLayers:
    """Computes linear layers on one GPU, one after the other.

    Args:
        device: The GPU.
        always_own: Use NEO's kernels outside of graphs, too; to compile and to test them.
    """

    def __init__(self, device: torch.device, *, always_own: bool = False) -> None:
        self.always_own = always_own
        # Tiles fit, and were measured, where blocks can start early and shared memory is large
        # (Hopper); elsewhere cuBLAS is the better guess.
        self._has_skinny = pdl_options(device)["USE_PDL"] and gpu_class(device) == "large"
        self._counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x @ weight.T + bias, [num_rows, n], in x's dtype.

        Args:
            x: [num_rows, k].
            weight: [n, k], x's dtype, contiguous.
            bias: [n], x's dtype; None for none.
        """
        if not self._takes(x.shape[0], weight):
            return F.linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.shape[0])
        skinny_linear(out, x, weight, bias, self._counters)
        return out

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return silu(gate) * up, [num_rows, n / 2], in x's dtype.

        Args:
            x: [num_rows, k].
            weight: [n, k], x's dtype, contiguous: the gate's rows, then up's.
            bias: [n], x's dtype; None for none.
        """
        out = x.new_empty(x.shape[0], weight.shape[0] // 2)
        if self._takes(x.shape[0], weight):
            skinny_gated_linear(out, x, weight, bias)
        else:
            silu_and_mul(out, F.linear(x, weight, bias))
        return out

    def _takes(self, num_rows: int, weight: torch.Tensor) -> bool:
        return (
            self._has_skinny
            and can_skinny_linear(num_rows, weight)
            and (self.always_own or torch.cuda.is_current_stream_capturing())
        )
