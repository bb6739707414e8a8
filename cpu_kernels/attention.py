"""Paged attention on the CPU: checks tensors, hands their addresses to the compiled kernels.

The KV cache is in the host layout of `host_kv_shapes`. No arithmetic happens here.
"""

import weakref
from pathlib import Path
from types import TracebackType

import torch

from cpu_kernels.checks import (
    check_cache,
    check_group,
    check_ints,
    check_rows,
)
from cpu_kernels.native import NativePool
from cpu_kernels.topology import attention_cpus, available_cpus, default_num_threads

# How long idle threads poll before they sleep: longer than the time between two layers of a step.
# With 50 µs, calls of 2 ms on 15 threads reached four points less of the plain read rate.
# Polling takes a core from torch, so threads poll only if the engine has a core of its own.
DEFAULT_SPIN_US = 2000


class CpuAttention:
    """Paged attention on a persistent pool of pinned threads and the calling thread.

    Safe to call from several Python threads, which take turns, with each other and with an
    `AttentionService` on the same pool; the GIL is free meanwhile. A process forked from this one
    must make its own.

    Args:
        cache_dir: Where `build` put the kernels.
        num_threads: How many threads work on a call, the caller among them; default: all physical
            cores but one, at least 1.
        pin: Bind each thread but the caller's to a core.
        spin_us: How long idle threads poll before they sleep, µs; default: 2,000 where a core is
            left for the engine, else 0.

    Raises:
        KernelBuildError: The kernels are not built.
        ValueError: `num_threads` or `spin_us` is out of range.
    """

    def __init__(
        self,
        cache_dir: Path,
        num_threads: int | None = None,
        *,
        pin: bool = True,
        spin_us: int | None = None,
    ) -> None:
        if num_threads is None:
            num_threads = default_num_threads()
        if not 1 <= num_threads <= 1024:
            raise ValueError(f"num_threads: expected 1 to 1024, got {num_threads}")
        if spin_us is None:
            spin_us = DEFAULT_SPIN_US if num_threads < len(available_cpus()) else 0
        if not 0 <= spin_us <= 1_000_000:
            raise ValueError(f"spin_us: expected 0 to 1,000,000 µs, got {spin_us}")
        cpus = attention_cpus(num_threads) if pin else []
        # Also at exit: the pool joins its threads when the last reference to it goes.
        self.native = NativePool(cache_dir, num_threads, cpus, spin_us)
        self._finalizer = weakref.finalize(self, self.native.close)
        self._num_threads = num_threads
        self._spin_us = spin_us
        self._cpus = tuple(cpus)

    @property
    def num_threads(self) -> int:
        """Number of threads that work on a call, the caller among them."""
        return self._num_threads

    @property
    def cpus(self) -> tuple[int, ...]:
        """The CPUs that threads are bound to; empty if they are not."""
        return self._cpus

    @property
    def spin_us(self) -> int:
        """How long idle threads poll before they sleep, µs."""
        return self._spin_us

    def paged_decode_attention(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        softmax_scale: float,
        *,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
    ) -> None:
        """Attend from one new token of each request to its cached tokens; append the new one.

        The result of a row depends on nothing but that row: not on the batch, not on the threads.

        Args:
            out: Written. `[num_seqs, num_q_heads, head_dim]`, any row stride, contiguous heads.
            q: Like `out`; bf16, fp16 or fp32, and `out`, `k` and `v` of the same type.
            k_cache: One layer's K, shape from `host_kv_shapes`, contiguous; bf16, fp16 or fp32.
            v_cache: One layer's V, likewise, same type as `k_cache`.
            block_tables: `[num_seqs, max_blocks]`, int32; entries past a request's end are
                not read.
            seq_lens: `[num_seqs]`, int32: tokens to attend to, including the new one. 0 makes the
                row of `out` zeros and appends nothing.
            softmax_scale: Factor of the scores.
            k: The new tokens' K rows, `[num_seqs, num_kv_heads, head_dim]`, written to the cache at
                position `seq_lens - 1` first; None if they are there already.
            v: The new tokens' V rows, likewise.

        Raises:
            ValueError: An argument has the wrong shape, type, stride or device, or a length or
                block id is out of range; nothing has been written then.
        """
        _, num_kv_heads, head_dim, _ = check_cache(k_cache, v_cache)
        num_seqs, num_q_heads = q.shape[0], q.shape[1] if q.dim() == 3 else 0
        q_shape = (num_seqs, num_q_heads, head_dim)
        check_rows("q", q, q_shape)
        check_group(num_q_heads, num_kv_heads)
        check_rows("out", out, q_shape, q.dtype)
        check_ints("block_tables", block_tables, (num_seqs, None), torch.int32)
        check_ints("seq_lens", seq_lens, (num_seqs,), torch.int32)
        if (k is None) != (v is None):
            raise ValueError("k and v: expected both or neither")
        for name, rows in (("k", k), ("v", v)):
            if rows is not None:
                check_rows(name, rows, (num_seqs, num_kv_heads, head_dim), q.dtype)
        self.native.context.decode(
            self.native.module.DecodeBatch(
                layer=self.native.layer(k_cache, v_cache),
                out=self.native.rows(out),
                q=self.native.rows(q),
                k=self.native.rows(k),
                v=self.native.rows(v),
                element=self.native.element(q),
                block_tables=block_tables.data_ptr(),
                block_tables_stride=block_tables.stride(0),
                max_blocks=block_tables.shape[1],
                seq_lens=seq_lens.data_ptr(),
                num_seqs=num_seqs,
                num_q_heads=num_q_heads,
                softmax_scale=softmax_scale,
            )
        )

    def store_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write tokens' K and V rows into one layer's cache, converted to its type.

        Args:
            k: `[num_tokens, num_kv_heads, head_dim]`, any row stride, contiguous heads.
            v: Like `k`, same type.
            k_cache: As in `paged_decode_attention`.
            v_cache: As in `paged_decode_attention`.
            slot_mapping: `[num_tokens]`, int64: `block_id * block_size + offset`, each slot at most
                once; negative skips the token.

        Raises:
            ValueError: As in `paged_decode_attention`; also for a slot past the cache's end.
        """
        _, num_kv_heads, head_dim, _ = check_cache(k_cache, v_cache)
        shape = (k.shape[0], num_kv_heads, head_dim)
        check_rows("k", k, shape)
        check_rows("v", v, shape, k.dtype)
        check_ints("slot_mapping", slot_mapping, shape[:1], torch.int64)
        self.native.context.store(
            self.native.module.StoreBatch(
                layer=self.native.layer(k_cache, v_cache),
                k=self.native.rows(k),
                v=self.native.rows(v),
                element=self.native.element(k),
                slot_mapping=slot_mapping.data_ptr(),
                num_tokens=shape[0],
            )
        )

    def gather_kv(
        self,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_len: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy one request's first `seq_len` tokens out of one layer's cache.

        Args:
            k_cache: As in `paged_decode_attention`.
            v_cache: As in `paged_decode_attention`.
            block_table: `[max_blocks]`, int32.
            seq_len: Tokens to copy.

        Returns:
            K and V, contiguous `[seq_len, num_kv_heads, head_dim]`, in the cache's type.

        Raises:
            ValueError: As in `paged_decode_attention`.
        """
        _, num_kv_heads, head_dim, block_size = check_cache(k_cache, v_cache)
        check_ints("block_table", block_table, (None,), torch.int32)
        capacity = block_table.shape[0] * block_size
        if not 0 <= seq_len <= capacity:
            raise ValueError(
                f"seq_len: expected 0 to {capacity} (what block_table holds), got {seq_len}"
            )
        k = torch.empty(seq_len, num_kv_heads, head_dim, dtype=k_cache.dtype)
        v = torch.empty_like(k)
        layer = self.native.layer(k_cache, v_cache)
        self.native.context.gather(
            layer, block_table.data_ptr(), seq_len, k.data_ptr(), v.data_ptr()
        )
        return k, v

    def read(self, memory: torch.Tensor) -> None:
        """Read a contiguous tensor's bytes with plain loads on all threads; for measuring."""
        if not memory.is_contiguous():
            raise ValueError(f"memory: expected a contiguous tensor, got {memory.stride()}")
        self.native.context.read(memory.data_ptr(), memory.numel() * memory.element_size())

    def touch(self, memory: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor with zeros on all threads.

        Fresh memory gets its pages then, near the threads that will read them, and many times
        faster than one thread makes them.
        """
        if memory.device.type != "cpu" or not memory.is_contiguous():
            raise ValueError(
                f"memory: expected a contiguous CPU tensor, got strides {memory.stride()} "
                f"on {memory.device}"
            )
        self.native.context.touch(memory.data_ptr(), memory.numel() * memory.element_size())

    def close(self) -> None:
        """End and join the threads, or let a service that is still open do it when it closes.

        A second call does nothing.
        """
        self._finalizer()

    def __enter__(self) -> "CpuAttention":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()
