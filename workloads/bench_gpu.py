"""`make bench-gpu`: the table that the GPU path is judged by, beside its floors and vLLM's figures.

Llama-3-8B shape, bfloat16, dummy weights. The reference figures were measured on one NVIDIA H200
with vLLM 0.23.0 (FlashAttention 3, CUDA graphs, torch.compile, asynchronous scheduling); on another
GPU they say nothing.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.scheduling.scheduler import SchedulerConfig
from gpu_kernels.bench import run_bench
from workloads.gpu_points import (
    decode_step_ms,
    prefill_tokens_per_s,
    throughput_requests_per_s,
)
from workloads.model_shapes import model_shape_folder
from workloads.result_file import write_result

KV_CAP_BLOCKS = 1650
NUM_REQUESTS = 200
# Output length to (floor, vLLM 0.23.0) in requests/s with 26,400 tokens of KV.
CAPPED = {
    50: (33.5, 28.84),
    100: (25.6, 20.51),
    200: (17.0, 12.90),
    300: (12.5, 9.08),
    400: (9.7, 6.79),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One measured figure beside its floor (the best this GPU could do) and vLLM's."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    vllm: float | None = None


def make_engine(device_kv_blocks: int | None) -> LLMEngine:
    """Return an engine for the 8B shape."""
    return LLMEngine(
        EngineConfig(
            model=str(model_shape_folder("llama-3-8b")),
            load_format="dummy",
            device="cuda",
            max_model_len=8192,
            device_kv_blocks=device_kv_blocks,
            scheduler=SchedulerConfig(
                mode="gpu-only", max_num_seqs=256, max_num_batched_tokens=2048
            ),
        )
    )


def bench_engine(output_lens: list[int]) -> list[Point]:
    """Measure the whole engine: without a cap on KV first, then with it."""
    start = time.perf_counter()
    engine = make_engine(None)
    points = [Point("start-up, dummy weights", time.perf_counter() - start, "s")]
    throughput_requests_per_s(engine, 8, 10)  # captures the first graphs
    step_ms = decode_step_ms(engine, 24, 1100, 64)
    points.append(Point("decode step, 24 × 1,100 tokens", step_ms, "ms", 4.3, 6.0))
    rate = prefill_tokens_per_s(engine, 24, 1000, 3)
    points.append(Point("prefill, 24 × 1,000 tokens", rate, "tokens/s", 56_000, 44_000))
    rate = throughput_requests_per_s(engine, NUM_REQUESTS, 200)
    points.append(
        Point("throughput, KV not capped, 1,000 in, 200 out", rate, "requests/s", None, 25.87)
    )
    engine.close()
    del engine
    torch.cuda.empty_cache()
    engine = make_engine(KV_CAP_BLOCKS)
    throughput_requests_per_s(engine, 8, 10)
    for output_len in output_lens:
        floor, vllm = CAPPED[output_len]
        rate = throughput_requests_per_s(engine, NUM_REQUESTS, output_len)
        name = f"throughput, KV 26,400 tokens, 1,000 in, {output_len} out"
        points.append(Point(name, rate, "requests/s", floor, vllm))
    engine.close()
    return points


def print_points(points: list[Point]) -> None:
    """Print the engine's figures."""
    table = Table(title="engine, Llama-3-8B shape, bfloat16", title_justify="left")
    for column in ("what", "measured", "floor", "vLLM 0.23.0", "unit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    for point in points:
        cells = ["" if v is None else f"{v:,.2f}" for v in (point.value, point.floor, point.vllm)]
        table.add_row(point.name, *cells, point.unit)
    Console(width=110).print(table)


def print_kernels(rows: list[dict[str, Any]]) -> None:
    """Print the kernels' figures."""
    table = Table(title="kernels", title_justify="left")
    columns = list(rows[0])
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=110).print(table)


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("workloads/results"))
    parser.add_argument("--output-lens", type=int, nargs="*", default=list(CAPPED))
    parser.add_argument("--kernels-only", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch sees no CUDA GPU on this machine")
    kernels = run_bench(torch.device("cuda"))
    points = [] if arguments.kernels_only else bench_engine(arguments.output_lens)
    results = {
        "kernels": kernels,
        "engine": [
            {"name": p.name, "value": p.value, "unit": p.unit, "floor": p.floor, "vllm": p.vllm}
            for p in points
        ],
    }
    path = write_result(arguments.out, "bench-gpu", results, {"output_lens": arguments.output_lens})
    print_kernels(kernels)
    if points:
        print_points(points)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
