"""What a step takes if KV comes or goes over PCIe beside it, and what PCIe gives meanwhile.

KV is copied, or attended to where it is.

Three parties want something of the others: kernels that copy take multiprocessors from the step's,
and PCIe takes the bandwidth of host memory from the CPU's attention.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from engine.model_config import ModelConfig
from engine.step_in_flight import StepResult
from gpu_kernels.kv_swap import swap_in_kv, swap_out_kv
from gpu_kernels.pcie_attention import host_pool_attention

NUM_BLOCKS = 128
"""Blocks of a copy: of Llama-3-8B's 275 MB, 5 ms at what PCIe 5 gives."""
NUM_PROGRAMS = (16, 8, 4, 2, 1)
NUM_ATTENDING = (32, 16, 8, 4)
"""Programs of attention: far smaller ones, of one warp each."""
_PIECE_BYTES = 4 * 2**20
_REPEATS = 7


class CopiesBeside:
    """Copies of blocks from pinned memory, by kernels of more and less programs and by an engine.

    Args:
        model: Whose blocks.
        block_size: Tokens of one.
        dtype: Of the KV cache.
        device: The GPU.
    """

    def __init__(
        self, model: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (model.num_layers, NUM_BLOCKS, model.num_kv_heads, block_size, model.head_dim)
        self._model = model
        self._on_device = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        self._on_host = [torch.zeros(size, dtype=dtype, pin_memory=True) for _ in range(2)]
        self._ids = torch.randperm(NUM_BLOCKS, dtype=torch.int32, device=device)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._num_bytes = sum(pool.nbytes for pool in self._on_device)

    def measure(self, mode: str, run_step: Callable[[], StepResult]) -> list[dict[str, Any]]:
        """Time a step alone and beside each way of copying.

        Args:
            mode: The step's, for the result.
            run_step: Runs it.

        Returns:
            A row for each: milliseconds of the step on the device and of its attention on the CPU,
            and gigabytes a second of the copy, alone and beside the step.
        """
        ways: list[tuple[str, Callable[[], None] | None]] = [("none", None)]
        for direction in ("in", "out"):
            ways += [
                (f"{direction}, {n} programs", self._by_kernel(n, direction)) for n in NUM_PROGRAMS
            ]
        ways += [(f"attended, {n} programs", self._by_attention(n)) for n in NUM_ATTENDING]
        ways.append(("in, copy engine", self._by_engine))
        return [{"mode": mode, "copy": name} | self._row(copy, run_step) for name, copy in ways]

    def _row(
        self, copy: Callable[[], None] | None, run_step: Callable[[], StepResult]
    ) -> dict[str, float]:
        alone, beside, results = [], [], []
        for _ in range(_REPEATS):
            if copy is not None:
                alone.append(self._seconds(self._start(copy)))
            events = None if copy is None else self._start(copy)
            results.append(run_step())
            if events is not None:
                beside.append(self._seconds(events))
        attention = [sum(r.host.attention_s) for r in results if r.host is not None]
        return {
            "step_ms": statistics.median(result.device_s for result in results) * 1e3,
            "cpu_attention_ms": statistics.median(attention) * 1e3 if attention else 0.0,
            "copy_gb_s": self._rate(beside),
            "copy_alone_gb_s": self._rate(alone),
        }

    def _rate(self, seconds: list[float]) -> float:
        return self._num_bytes / statistics.median(seconds) / 1e9 if seconds else 0.0

    def _start(self, copy: Callable[[], None]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Launch a copy beside whatever comes next, and return marks before and behind it."""
        marks = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            marks[0].record(self._stream)
            copy()
            marks[1].record(self._stream)
        return marks

    def _seconds(self, marks: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        marks[1].synchronize()
        return float(marks[0].elapsed_time(marks[1])) / 1e3

    def _by_kernel(self, max_programs: int, direction: str) -> Callable[[], None]:
        k_host, v_host = self._on_host
        k_host = k_host.view(*k_host.shape[:3], k_host.shape[4], k_host.shape[3])
        pools = (*self._on_device, self._ids, k_host, v_host, self._ids)
        copy = swap_in_kv if direction == "in" else swap_out_kv
        return lambda: copy(*pools, max_programs=max_programs)

    def _by_attention(self, num_programs: int) -> Callable[[], None]:
        """Attend to all blocks where they are, one row a layer."""
        k_host, v_host = self._on_host
        num_layers, num_blocks, num_kv_heads, block_size, head_dim = k_host.shape
        layers = torch.arange(num_layers, dtype=torch.int32, device=self._device)
        length = torch.full_like(layers, num_blocks * block_size)
        entries = torch.stack([layers, layers, length, layers * num_blocks])
        blocks = (layers[:, None] * num_blocks + self._ids).flatten()
        q_width = self._model.num_q_heads * head_dim
        width = q_width + 2 * num_kv_heads * head_dim
        rows = torch.randn(num_layers, width, device=self._device).to(k_host.dtype)
        out = rows.new_empty(num_layers, q_width)
        k_host = k_host.view(-1, num_kv_heads, head_dim, block_size)
        pools, scale = (k_host, v_host.flatten(0, 1)), head_dim**-0.5
        return lambda: host_pool_attention(
            out, rows, entries, blocks, *pools, scale, num_programs=num_programs
        )

    def _by_engine(self) -> None:
        for device, host in zip(self._on_device, self._on_host, strict=True):
            pieces = [
                pool.view(torch.uint8).flatten().split(_PIECE_BYTES) for pool in (device, host)
            ]
            for target, source in zip(*pieces, strict=True):
                target.copy_(source, non_blocking=True)
