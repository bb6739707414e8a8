"""`make bench-gpu`: the table that the GPU path is judged by, beside its floors and vLLM's figures.

Llama-3-8B shape, bfloat16, dummy weights. The reference figures were measured on one NVIDIA H200
with vLLM 0.23.0 (FlashAttention 3, CUDA graphs, torch.compile, asynchronous scheduling); on another
GPU they say nothing.
"""

import argparse
import time
from dataclasses import asdict, dataclass
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
    decode_steps,
    prefill_tokens_per_s,
    throughput_requests_per_s,
)
from workloads.model_shapes import model_shape_folder
from workloads.result_file import write_result

KV_CAP_BLOCKS = 1650
CAPPED_CHUNK = 512
"""Tokens of a step where few requests fit: prompts ride along with decodes at little cost."""
NUM_REQUESTS = 200
# Output length to (floor, vLLM 0.23.0, goal over vLLM) in requests/s with 26,400 tokens of KV.
CAPPED = {
    50: (33.5, 28.84, 1.15),
    100: (25.6, 20.51, 1.15),
    200: (17.0, 12.90, 1.2),
    300: (12.5, 9.08, 1.2),
    400: (9.7, 6.79, 1.2),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One measured figure beside its floor (the best this GPU could do), vLLM's and the goal."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    vllm: float | None = None
    goal: float | None = None


def make_engine(device_kv_blocks: int | None, chunk: int = 8192) -> LLMEngine:
    """Return an engine for the 8B shape, whose steps have as many tokens as vLLM's had."""
    return LLMEngine(
        EngineConfig(
            model=str(model_shape_folder("llama-3-8b")),
            load_format="dummy",
            device="cuda",
            max_model_len=8192,
            device_kv_blocks=device_kv_blocks,
            scheduler=SchedulerConfig(
                mode="gpu-only", max_num_seqs=256, max_num_batched_tokens=chunk
            ),
        )
    )


def bench_engine(output_lens: list[int]) -> list[Point]:
    """Measure the whole engine: without a cap on KV first, then with it."""
    start = time.perf_counter()
    engine = make_engine(None)
    points = [Point("start-up, dummy weights", time.perf_counter() - start, "s")]
    throughput_requests_per_s(engine, 8, 10)  # captures the first graphs
    steps = decode_steps(engine, 24, 1100, 64)
    points.append(Point("decode step, 24 × 1,100 tokens", steps.median_ms, "ms", 4.3, 6.0, 5.2))
    idle = 100 * steps.idle_share
    points.append(Point("GPU idle during these steps", idle, "%", 0.0, None, 3.0))
    rate = prefill_tokens_per_s(engine, 24, 1000, 3)
    points.append(Point("prefill, 24 × 1,000 tokens", rate, "tokens/s", 56_000, 44_000, 50_000))
    rate = throughput_requests_per_s(engine, NUM_REQUESTS, 200)
    name = "throughput, KV not capped, 1,000 in, 200 out"
    points.append(Point(name, rate, "requests/s", None, 25.87, 1.1 * 25.87))
    engine.close()
    engine = make_engine(KV_CAP_BLOCKS, CAPPED_CHUNK)
    throughput_requests_per_s(engine, 8, 10)
    for output_len in output_lens:
        floor, vllm, gain = CAPPED[output_len]
        rate = throughput_requests_per_s(engine, NUM_REQUESTS, output_len)
        name = f"throughput, KV 26,400 tokens, 1,000 in, {output_len} out"
        points.append(Point(name, rate, "requests/s", floor, vllm, gain * vllm))
    engine.close()
    return points


def print_points(points: list[Point]) -> None:
    """Print the engine's figures."""
    table = Table(title="engine, Llama-3-8B shape, bfloat16", title_justify="left")
    for column in ("what", "measured", "floor", "vLLM 0.23.0", "goal", "unit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    for point in points:
        values = (point.value, point.floor, point.vllm, point.goal)
        cells = ["" if v is None else f"{v:,.2f}" for v in values]
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
        "engine": [asdict(point) for point in points],
    }
    path = write_result(arguments.out, "bench-gpu", results, {"output_lens": arguments.output_lens})
    print_kernels(kernels)
    if points:
        print_points(points)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
