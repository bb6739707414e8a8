"""Linear layers: NEO's kernels for a few rows in CUDA graphs, cuBLAS for all others.

Launched one by one, NEO's kernels cost more of the host's time than they save of the device's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

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

    Attributes:
        room: Multiprocessors that kernels of graphs are to leave to copies beside them. Without
            any, the few that these hold cost all others another round: a Llama-2-7B layer's take
            276 instead of 160 µs for 248 rows beside copies of two programs each way (H200, cuBLAS
            13).

    Args:
        device: The GPU.
        always_own: Use NEO's kernels outside of graphs, too; to compile and to test them.
    """

    def __init__(self, device: torch.device, *, always_own: bool = False) -> None:
        self.always_own = always_own
        self.room = 0
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
            return self._by_cublas(x, weight, bias)
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
            silu_and_mul(out, self._by_cublas(x, weight, bias))
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

    def _by_cublas(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not (self.room and torch.cuda.is_current_stream_capturing()):
            return F.linear(x, weight, bias)
        with _beside_copies(self.room):
            return F.linear(x, weight, bias)

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


@contextmanager
def _beside_copies(room: int) -> Iterator[None]:
    """Let cuBLAS choose kernels for a GPU of some multiprocessors less, where torch can tell it."""
    set_room = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if set_room is None or not torch.backends.cuda.is_built():
        yield
        return
    # Only cuBLASLt is told; both choose among the same kernels.
    library = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    set_room(room)
    try:
        yield
    finally:
        set_room(None)
        torch.backends.cuda.preferred_blas_library(library)
