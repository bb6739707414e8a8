"""The compiled pool of attention threads, and tensors as the compiled kernels take them.

For this package only; checks nothing.
"""

from pathlib import Path
from typing import Any

import torch

from cpu_kernels.build import load
from cpu_kernels.checks import DTYPES


class NativePool:
    """The compiled module and one pool in it.

    Args:
        cache_dir: Where `build` put the kernels.
        num_threads: How many threads work on a call, the caller among them.
        cpus: The core of each, the caller's last; empty: any.
        spin_us: How long idle threads poll before they sleep, µs.
    """

    def __init__(self, cache_dir: Path, num_threads: int, cpus: list[int], spin_us: int) -> None:
        self.module = load(cache_dir)
        self._context = [self.module.Context(num_threads, cpus, spin_us)]

    @property
    def context(self) -> Any:
        """The pool.

        Raises:
            ValueError: It has been closed.
        """
        if not self._context:
            raise ValueError("CpuAttention: it has been closed")
        return self._context[0]

    def close(self) -> None:
        """Drop the pool, which joins its threads unless a service still uses it."""
        self._context.clear()

    def element(self, tensor: torch.Tensor) -> Any:
        """Return a tensor's element type."""
        return getattr(self.module.Element, DTYPES[tensor.dtype])

    def rows(self, rows: torch.Tensor | None) -> Any:
        """Return where `[rows, heads, head_dim]` lie."""
        if rows is None:
            return self.module.Rows(0, 0)
        return self.module.Rows(rows.data_ptr(), rows.stride(0))

    def layer(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
        """Return where one layer's K and V lie."""
        num_blocks, num_kv_heads, head_dim, block_size = k_cache.shape
        return self.module.KvLayer(
            k=k_cache.data_ptr(),
            v=v_cache.data_ptr(),
            element=self.element(k_cache),
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
        )
