"""Linear layers: NEO's kernels for a few rows in CUDA graphs, cuBLAS for all others.

Launched one by one, NEO's kernels cost more of the host's time than they save of the device's.
"""

import torch
import torch.nn.functional as F

from gpu_kernels.activation import silu_and_mul
from gpu_kernels.few_rows import (
    NUM_COUNTERS,
    OpenNorm,
    can_skinny_linear,
    skinny_gated_linear,
    skinny_linear,
    skinny_linear_add_norm,
)
from gpu_kernels.norm import add_rms_norm
from gpu_kernels.pdl import pdl_options
from gpu_kernels.tiles import gpu_class

OPEN_DTYPES = (torch.bfloat16,)
"""Of rows that are left scaled but not normalised: in float16 they may overflow sooner."""


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
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        open_norm: OpenNorm | None = None,
    ) -> torch.Tensor:
        """Return x @ weight.T + bias, [num_rows, n], in x's dtype.

        Args:
            x: [num_rows, k].
            weight: [n, k], x's dtype, contiguous.
            bias: [n], x's dtype; None for none.
            open_norm: What x lacks, from `linear_add_norm` with this weight as the next one.
        """
        if not self._takes(x.shape[0], weight):
            assert open_norm is None, "x was left open for a layer that closes it"
            return F.linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.shape[0])
        skinny_linear(out, x, weight, bias, self._counters, open_norm)
        return out

    def gated_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        open_norm: OpenNorm | None = None,
    ) -> torch.Tensor:
        """Return silu(gate) * up, [num_rows, n / 2], in x's dtype.

        Args:
            x: [num_rows, k].
            weight: [n, k], x's dtype, contiguous: the gate's rows, then up's.
            bias: [n], x's dtype; None for none.
            open_norm: What x lacks, from `linear_add_norm` with this weight as the next one.
        """
        out = x.new_empty(x.shape[0], weight.shape[0] // 2)
        if self._takes(x.shape[0], weight):
            skinny_gated_linear(out, x, weight, bias, open_norm)
        else:
            assert open_norm is None, "x was left open for a layer that closes it"
            silu_and_mul(out, F.linear(x, weight, bias))
        return out

    def linear_add_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        next_weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, OpenNorm | None]:
        """Add a linear layer's output to the residual in place and return the norm of the sum.

        Args:
            x: [num_rows, k].
            weight: [n, k], x's dtype, contiguous.
            bias: [n], x's dtype; None for none.
            residual: [num_rows, n], x's dtype.
            norm_weight: [n], x's dtype.
            eps: Added to the mean square.
            next_weight: Of the layer that reads the result; None if that is not one of these.

        Returns:
            [num_rows, n], and what that lacks: the layer that reads it is to be given both.
        """
        if self._leaves_open(x, weight, next_weight):
            out = torch.empty_like(residual)
            layer = (weight, bias, norm_weight, eps, self._counters)
            return out, skinny_linear_add_norm(out, residual, x, *layer)
        out = self.linear(x, weight, bias)
        add_rms_norm(out, out, residual, norm_weight, eps)
        return out, None

    def _leaves_open(
        self, x: torch.Tensor, weight: torch.Tensor, next_weight: torch.Tensor | None
    ) -> bool:
        return (
            next_weight is not None
            and x.dtype in OPEN_DTYPES
            and self._takes(x.shape[0], weight)
            and self._takes(x.shape[0], next_weight)
        )

    def _takes(self, num_rows: int, weight: torch.Tensor) -> bool:
        return (
            self._has_skinny
            and can_skinny_linear(num_rows, weight)
            and (self.always_own or torch.cuda.is_current_stream_capturing())
        )
