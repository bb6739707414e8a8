"""The kernels' benchmark: each against the least time its bytes or its operations need.

`run_bench` gives rows for `make bench-gpu`; `python -m gpu_kernels.bench` prints them.
"""

import json
from collections.abc import Callable
from typing import Any

import torch

from gpu_kernels.activation import silu_and_mul
from gpu_kernels.bench_inputs import (
    Heads,
    causal_flops,
    decode_input_sets,
    make_paged_inputs,
)
from gpu_kernels.kv_store import store_kv
from gpu_kernels.kv_swap import swap_in_kv, swap_out_kv
from gpu_kernels.norm import add_rms_norm, rms_norm
from gpu_kernels.rope_store import rope_store_kv
from gpu_kernels.timing import Launch, median_us

# The H200's measured device-to-device copy rate, bytes read and written.
COPY_BYTES_PER_S = 4.3e12
# Measured for pinned copies over PCIe, either way.
PINNED_BYTES_PER_S = 55e9
HIDDEN_SIZE = 4096
INTERMEDIATE_SIZE = 14336
NUM_LAYERS = 32
NUM_ROWS = 2048
NUM_BUFFER_SETS = 6

Row = dict[str, Any]


def memory_row(
    name: str, us: float, num_bytes: float, goal_us: float, bytes_per_s: float = COPY_BYTES_PER_S
) -> Row:
    """A row of a kernel bound by memory: its floor is the time of a copy of its bytes."""
    floor_us = num_bytes / bytes_per_s * 1e6
    return {
        "name": name, "us": round(us, 2), "floor_us": round(floor_us, 2),
        "ratio": round(us / floor_us, 2), "rate": f"{num_bytes / us / 1e6:.2f} TB/s",
        "goal_us": round(goal_us, 1), "ok": us <= goal_us,
    }  # fmt: skip


def bench_decode(device: torch.device) -> list[Row]:
    """Decode attention with its merge, shuffled blocks, cold cache."""
    rows = []
    heads = Heads()
    goals = {(24, 1100): 36.0, (64, 4000): 265.0}
    for num_seqs, seq_len in (*goals, (1, 1100), (1, 30_000), (256, 1000)):
        sets = decode_input_sets(heads, num_seqs, seq_len, device)
        us = median_us([inputs.decode() for inputs in sets])
        num_bytes = heads.kv_bytes(num_seqs * seq_len)
        goal = goals.get((num_seqs, seq_len), 10.0 + 1.5 * num_bytes / COPY_BYTES_PER_S * 1e6)
        rows.append(memory_row(f"decode attention {num_seqs} x {seq_len}", us, num_bytes, goal))
        del sets
    return rows


def bench_prefill(device: torch.device) -> list[Row]:
    """Prefill attention; the goal holds for the first case."""
    rows = []
    heads = Heads()
    cases = ((1, 8192, 8192), (4, 2048, 2048), (1, 8192, 1024), (24, 1000, 1000))
    for num_seqs, seq_len, num_new in cases:
        sets = [make_paged_inputs(heads, num_seqs, seq_len, num_new, device) for _ in range(2)]
        us = median_us([inputs.prefill() for inputs in sets], rounds=2)
        tflops = causal_flops(heads, num_seqs, seq_len, num_new) / us / 1e6
        goal_us = us * tflops / 400
        row: Row = {"name": f"prefill attention {num_seqs} x {num_new} of {seq_len}"}
        row |= {"us": round(us, 1), "rate": f"{tflops:.0f} TFLOP/s", "goal_us": round(goal_us, 1)}
        rows.append(row | {"ok": tflops >= 400 or num_new < 8192})
    return rows


def bench_small(device: torch.device) -> list[Row]:
    """The kernels around the linear layers at 2,048 rows of the Llama-3-8B shape."""

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=torch.bfloat16, device=device)

    heads = Heads()
    n, item = NUM_ROWS, 2
    q_width, kv_width = heads.num_q_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    num_blocks = n // heads.block_size
    weight = randn(HIDDEN_SIZE)
    positions = torch.arange(n, device=device)
    slots = torch.randperm(num_blocks, device=device).repeat_interleave(heads.block_size)
    slots = slots * heads.block_size + positions % heads.block_size
    cos_sin = torch.randn(n, heads.head_dim, device=device)

    def copy_launch() -> Launch:
        source, target = randn(n, HIDDEN_SIZE * 4), randn(n, HIDDEN_SIZE * 4)
        return lambda: target.copy_(source)

    def norm_launch() -> Launch:
        x, out = randn(n, HIDDEN_SIZE), randn(n, HIDDEN_SIZE)
        return lambda: rms_norm(out, x, weight, 1e-5)

    def add_norm_launch() -> Launch:
        x, out, residual = (randn(n, HIDDEN_SIZE) for _ in range(3))
        return lambda: add_rms_norm(out, x, residual, weight, 1e-5)

    def silu_launch() -> Launch:
        gate_up, out = randn(n, 2 * INTERMEDIATE_SIZE), randn(n, INTERMEDIATE_SIZE)
        return lambda: silu_and_mul(out, gate_up)

    def qkv_and_pool() -> tuple[list[torch.Tensor], torch.Tensor]:
        qkv = randn(n, q_width + 2 * kv_width)
        parts = qkv.split([q_width, kv_width, kv_width], dim=1)
        pool = randn(2, num_blocks, heads.num_kv_heads, heads.block_size, heads.head_dim)
        return [part.view(n, -1, heads.head_dim) for part in parts], pool

    def rope_launch() -> Launch:
        (q, k, v), pool = qkv_and_pool()
        return lambda: rope_store_kv(q, k, v, positions, cos_sin, pool[0], pool[1], slots)

    def store_launch() -> Launch:
        (_, k, v), pool = qkv_and_pool()
        return lambda: store_kv(k, v, pool[0], pool[1], slots)

    kv_bytes = 2 * n * kv_width * item
    cases: list[tuple[str, Callable[[], Launch], int]] = [
        ("copy", copy_launch, 2 * n * HIDDEN_SIZE * 4 * item),
        ("rms_norm", norm_launch, 2 * n * HIDDEN_SIZE * item),
        ("add_rms_norm", add_norm_launch, 4 * n * HIDDEN_SIZE * item),
        ("silu_and_mul", silu_launch, 3 * n * INTERMEDIATE_SIZE * item),
        ("rope_store_kv", rope_launch, 2 * n * q_width * item + 2 * kv_bytes + kv_bytes // 2),
        ("store_kv", store_launch, 2 * kv_bytes),
    ]
    rows = []
    for name, make_launch, num_bytes in cases:
        us = median_us([make_launch() for _ in range(NUM_BUFFER_SETS)])
        goal_us = 3 * num_bytes / COPY_BYTES_PER_S * 1e6
        rows.append(memory_row(f"{name}, {n} rows", us, num_bytes, goal_us))
    return rows


def bench_swap(device: torch.device) -> list[Row]:
    """Swap of shuffled blocks of all layers, device pool to or from 2 GiB of pinned memory."""
    heads, num_blocks = Heads(), 1024
    size = (NUM_LAYERS, num_blocks, heads.num_kv_heads, heads.block_size, heads.head_dim)
    k, v = (torch.zeros(size, dtype=heads.dtype, device=device) for _ in range(2))
    # Powers of two, because the allocator of pinned memory rounds up to them.
    k_host, v_host = (torch.empty(size, dtype=heads.dtype, pin_memory=True) for _ in range(2))
    k_host = k_host.view(*size[:3], heads.head_dim, heads.block_size)
    rows = []
    for swap in (swap_out_kv, swap_in_kv):
        for n in (64, num_blocks):
            order, host_order = (
                torch.randperm(num_blocks, dtype=torch.int32, device=device) for _ in range(2)
            )
            args = (k, v, order[:n], k_host, v_host, host_order[:n])
            us = median_us([lambda swap=swap, args=args: swap(*args)], rounds=1, replays=3)  # type: ignore[misc]
            num_bytes = NUM_LAYERS * heads.kv_bytes(n * heads.block_size)
            goal_us = 1.25 * num_bytes / PINNED_BYTES_PER_S * 1e6
            name = f"{swap.__name__}, {n} blocks"
            row = memory_row(name, us, num_bytes, goal_us, PINNED_BYTES_PER_S)
            rows.append(row | {"rate": f"{num_bytes / us / 1e3:.1f} GB/s"})
    return rows


def run_bench(device: torch.device) -> list[Row]:
    """Times all kernels.

    Args:
        device: A CUDA device; it must be the current one.

    Returns:
        Rows with name, us (median microseconds in a CUDA graph), rate, goal_us, ok and, where
        memory is the bound, floor_us and ratio.
    """
    torch.manual_seed(0)
    small = bench_small(device) + bench_swap(device)
    return bench_decode(device) + bench_prefill(device) + small


def main() -> None:
    """Prints the rows as JSON lines and as a table."""
    rows = run_bench(torch.device("cuda", torch.cuda.current_device()))
    for row in rows:
        print(json.dumps(row))
    print(f"\n{'kernel':38}{'µs':>10}{'floor':>9}{'ratio':>7}{'goal':>9}  rate")
    for row in rows:
        floor, ratio = row.get("floor_us", ""), row.get("ratio", "")
        mark = "" if row["ok"] else "  MISSED"
        print(
            f"{row['name']:38}{row['us']:>10}{floor:>9}{ratio:>7}{row['goal_us']:>9}"
            f"  {row['rate']}{mark}"
        )


if __name__ == "__main__":
    main()
