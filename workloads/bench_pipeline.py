"""Where the time of a step goes: steps of every mode at chosen loads, part by part.

Decode steps of a model's true shape with dummy weights. The rows' caches are not computed first:
the times of a step do not depend on what is in them.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler_config import MODES, SchedulerConfig
from engine.step_in_flight import StepResult
from engine.step_plan import RotatingRow, ScheduledRequest, StepMode, StepPlan, SubBatch
from workloads.copies_beside import CopiesBeside
from workloads.gpu_points import run_to_end
from workloads.long_request import measure_long_request
from workloads.model_shapes import model_shape_folder
from workloads.result_file import write_result
from workloads.synthetic import synthetic_workload

KERNEL_NAMES = (
    ("gpu_attention", ("decode_attention", "merge_splits", "prefill_attention")),
    ("gpu_linear", ("gemm", "gemv", "cutlass", "nvjet", "splitK", "cublas", "skinny")),
)
HOST_ROWS = (0, 1, 8, 16, 32, 64)
ROTATING_ROWS = (33, 66, 132)
DIRECT_SHARES = (0.0, 0.15, 0.3)
"""Of the rotating rows' tokens, those that the GPU attends to itself."""
REPEATS = 7
LONG_REQUEST = 100_000
NUM_LONG_OUTPUT = 32


class StepBench:
    """Builds and times steps by hand.

    Args:
        runner: Idle; all its blocks are used.
        context_len: Tokens of every request.
    """

    def __init__(self, runner: ModelRunner, context_len: int) -> None:
        self._runner = runner
        self._context_len = context_len
        self._num_requests = 0

    def rows(self, count: int, *, on_host: bool, context_len: int) -> list[ScheduledRequest]:
        """Return decodes of new requests."""
        pool = self._runner.host_pool if on_host else self._runner.pool
        assert pool is not None, "host rows need a host pool"
        found = []
        for _ in range(count):
            request = Request(
                request_id=str(self._num_requests),
                prompt_token_ids=[11] * context_len,
                params=SamplingParams(temperature=0),
                max_total_tokens=context_len + 1,
            )
            self._num_requests += 1
            pool.grow(request.request_id, context_len)
            found.append(ScheduledRequest(request, context_len - 1, 1))
        return found

    def measure(
        self, device_rows: int, host_rows: int, lanes: int, host_len: int
    ) -> dict[str, Any]:
        """Time a step with decodes on both sides, host rows dealt half and half to two lanes.

        Returns:
            Milliseconds of the parts.
        """
        gdec = self.rows(device_rows, on_host=False, context_len=self._context_len)
        cdec = self.rows(host_rows, on_host=True, context_len=host_len)
        middle = (host_rows + 1) // 2 if lanes == 2 else 0
        sub_batches = [SubBatch(gdec=gdec, cdec=cdec[:middle]), SubBatch(cdec=cdec[middle:])]
        if lanes == 1:
            sub_batches = [SubBatch(gdec=gdec, cdec=cdec)]
        mode = StepMode.ASYMMETRIC if host_rows else StepMode.GPU_ONLY
        plan = StepPlan(mode=mode, sub_batches=sub_batches)
        results = [self._runner.execute(plan) for _ in range(REPEATS + 2)][2:]
        kernels = kernel_ms(lambda: self._runner.execute(plan))
        self._free(plan.scheduled)
        loads = {
            "mode": mode.value,
            "device_rows": device_rows,
            "host_rows": host_rows,
            "lanes": lanes,
            "host_len": host_len,
            "direct_share": 0.0,
        }
        return loads | _times(results, kernels)

    def measure_overlap(
        self, device_rows: int, host_rows: int, host_len: int, direct_share: float
    ) -> dict[str, Any]:
        """Time steps of a full rotation, whose rows are spread evenly over the layers.

        Returns:
            Milliseconds of the parts.
        """
        with self.rotation(device_rows, host_rows, host_len, direct_share) as run:
            results = [run() for _ in range(REPEATS)]
            kernels = kernel_ms(run)
        loads = {
            "mode": StepMode.OVERLAP.value,
            "device_rows": device_rows,
            "host_rows": host_rows,
            "lanes": 1,
            "host_len": host_len,
            "direct_share": direct_share,
        }
        return loads | _times(results, kernels)

    @contextmanager
    def decodes(self, device_rows: int) -> Iterator[Callable[[], StepResult]]:
        """Provide what runs a step of device-resident decodes."""
        gdec = self.rows(device_rows, on_host=False, context_len=self._context_len)
        plan = StepPlan(sub_batches=[SubBatch(gdec=gdec)])
        yield lambda: self._runner.execute(plan)
        self._free(gdec)

    @contextmanager
    def rotation(
        self, device_rows: int, host_rows: int, host_len: int, direct_share: float = 0.0
    ) -> Iterator[Callable[[], StepResult]]:
        """Provide what runs a step of a rotation that is full, beside device-resident decodes."""
        gdec = self.rows(device_rows, on_host=False, context_len=self._context_len)
        shares = self.rows(host_rows, on_host=True, context_len=host_len)
        num_layers = self._runner.model_config.num_layers
        steps = itertools.count()

        def run() -> StepResult:
            number, rotating = next(steps), []
            for index, share in enumerate(shares):
                layer = share.request.rotation_layer
                if layer is not None or number % (num_layers + 1) == index % (num_layers + 1):
                    rotating.append(RotatingRow(share, layer, samples=layer == num_layers - 1))
            batch = SubBatch(gdec=gdec, rotating=rotating)
            plan = StepPlan(StepMode.OVERLAP, [batch], direct_share=direct_share)
            result = self._runner.execute(plan)
            for row in rotating:
                row.share.request.rotation_layer = None if row.samples else row.next_layer
            return result

        for _ in range(num_layers + 1):
            run()
        yield run
        for share in shares:
            share.request.rotation_layer = None
        self._free(gdec + shares)

    def _free(self, items: Sequence[ScheduledRequest]) -> None:
        for item in items:
            for pool in (self._runner.pool, self._runner.host_pool):
                if pool is not None:
                    pool.free(item.request.request_id)


def _times(results: Sequence[StepResult], kernels: dict[str, float]) -> dict[str, float]:
    hosts = [result.host for result in results if result.host is not None]
    return {
        "step_ms": _median(result.step_s for result in results),
        **{f"{name}_ms": value for name, value in kernels.items()},
        "device_ms": _median(result.device_s for result in results),
        "exposed_wait_ms": _median(host.device_waiting_s for host in hosts),
        "launch_ms": _median(result.launch_s for result in results),
        "cpu_attention_ms": _median(sum(host.attention_s) for host in hosts),
        "cpu_idle_ms": _median(host.waiting_s for host in hosts),
        "handover_us": _median(host.handover_s for host in hosts) * 1e3,
    }


def kernel_ms(run: Callable[[], object]) -> dict[str, float]:
    """Return what a step's kernels take on the GPU by themselves, by kind, in milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    totals = {"gpu_linear": 0.0, "gpu_attention": 0.0, "gpu_other": 0.0}
    for event in profile.key_averages():
        kind = next((k for k, names in KERNEL_NAMES if any(n in event.key for n in names)), None)
        totals[kind or "gpu_other"] += event.self_device_time_total / 1000
    return totals


def _median(seconds: Any) -> float:
    values = list(seconds)
    return statistics.median(values) * 1e3 if values else 0.0


def run(model: str, device_kv_blocks: int, host_kv_gb: float, context_len: int) -> dict[str, Any]:
    """Measure all loads and the cost tables on one runner."""
    config = EngineConfig(
        model=str(model_shape_folder(model)),
        load_format="dummy",
        max_model_len=8192,
        device_kv_blocks=device_kv_blocks,
        host_kv_gb=host_kv_gb,
        pcie_attention=True,
        scheduler=SchedulerConfig(mode="overlap"),
    )
    start = time.perf_counter()
    checkpoint = open_checkpoint(config.model, load_format="dummy")
    runner = ModelRunner(config, checkpoint, lambda line: None)
    start_up_s = time.perf_counter() - start
    start = time.perf_counter()
    tables = runner.profile(lambda line: None)
    profile_s = time.perf_counter() - start
    bench = StepBench(runner, context_len)
    device_rows = device_kv_blocks * config.block_size // (context_len + config.block_size)
    rows = [bench.measure(device_rows, 0, 1, context_len)]
    for host_rows in HOST_ROWS[1:]:
        rows.append(bench.measure(device_rows, host_rows, 2, context_len))
        rows.append(bench.measure(device_rows, host_rows, 2, 1))
    rows.append(bench.measure(device_rows, 16, 1, context_len))
    rows += [
        bench.measure_overlap(device_rows, host_rows, context_len, share)
        for host_rows in ROTATING_ROWS
        for share in DIRECT_SHARES
    ]
    beside = []
    copies = CopiesBeside(runner.model_config, config.block_size, runner.dtype, runner.device)
    with bench.decodes(device_rows) as run_step:
        beside += copies.measure("gpu_only", run_step)
    with bench.rotation(device_rows, ROTATING_ROWS[-1], context_len) as run_step:
        beside += copies.measure("overlap", run_step)
    runner.close()
    return {
        "start_up_s": start_up_s,
        "profile_s": profile_s,
        "linear_us": [(x, y * 1e6) for x, y in tables.linear.points],
        "cpu_attention_us": [(x, y * 1e6) for x, y in tables.cpu_attention.points],
        "gpu_attention_us": [(x, y * 1e6) for x, y in tables.gpu_attention.points],
        "swap_us": [(x, y * 1e6) for x, y in tables.swap.points],
        "handover_us": tables.handover_s * 1e6,
        "launch_us": tables.launch_s * 1e6,
        "handover_launch_us": tables.handover_launch_s * 1e6,
        "steps": rows,
        "beside": beside,
    }


def throughput(
    model: str,
    device_kv_blocks: int,
    host_kv_gb: float,
    num_requests: int,
    lengths: tuple[int, int],
) -> list[dict[str, Any]]:
    """Measure whole runs in every mode, requests all at once."""
    rows = []
    for mode in MODES:
        limits = SchedulerConfig(mode=mode, max_num_batched_tokens=2048)
        engine = LLMEngine(
            EngineConfig(
                model=str(model_shape_folder(model)),
                load_format="dummy",
                max_model_len=8192 if model == "llama-3-8b" else 832,
                device_kv_blocks=device_kv_blocks,
                host_kv_gb=host_kv_gb,
                scheduler=limits,
            )
        )
        vocab_size = engine.runner.model_config.vocab_size
        run_to_end(engine, synthetic_workload(8, lengths[0], 8, vocab_size, seed=1))
        warm_steps = engine.stats.num_steps
        seconds = run_to_end(engine, synthetic_workload(num_requests, *lengths, vocab_size, seed=0))
        stats = engine.stats
        rows.append(
            {
                "model": model,
                "mode": mode,
                "requests_per_s": num_requests / seconds,
                "steps": stats.num_steps - warm_steps,
                "asymmetric_steps": stats.steps_by_mode["asymmetric"],
                "overlap_steps": stats.steps_by_mode["overlap"],
                "cpu_busy_share": stats.cpu_attention_time_s / stats.step_time_s,
                "predicted_over_measured": stats.predicted_step_time_s
                / max(stats.matched_step_time_s, 1e-9),
                "swapped_blocks": stats.swapped_out_blocks + stats.swapped_in_blocks,
                "preemptions": stats.num_preemptions,
            }
        )
        engine.close()
    return rows


def long_request(device_kv_blocks: int, host_kv_gb: float, num_tokens: int) -> list[dict[str, Any]]:
    """Measure one request of Llama-3-8B that the device's pool cannot hold."""
    engine = LLMEngine(
        EngineConfig(
            model=str(model_shape_folder("llama-3-8b")),
            load_format="dummy",
            max_model_len=num_tokens + 64,
            device_kv_blocks=device_kv_blocks,
            host_kv_gb=host_kv_gb,
            scheduler=SchedulerConfig(max_num_batched_tokens=2048),
        )
    )
    found = measure_long_request(engine, num_tokens, NUM_LONG_OUTPUT)
    engine.close()
    return [asdict(found) | {"attention_share": found.attention_share}]


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print dictionaries with the same keys as a table."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=150).print(table)


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("workloads/results"))
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--device-kv-blocks", type=int, default=1650)
    parser.add_argument("--host-kv-gb", type=float, default=20.0)
    parser.add_argument("--context-len", type=int, default=1088)
    parser.add_argument("--steps-only", action="store_true", help="leave out whole runs")
    options = vars(parser.parse_args())
    out, steps_only = options.pop("out"), options.pop("steps_only")
    if not torch.cuda.is_available():
        raise SystemExit("bench-pipeline: torch sees no CUDA GPU on this machine")
    results = run(**options)
    blocks, host_gb = options["device_kv_blocks"], options["host_kv_gb"]
    if not steps_only:
        results["throughput"] = [
            *throughput("llama-3-8b", blocks, host_gb, 100, (1000, 100)),
            *throughput("llama-2-7b", 54, host_gb, 100, (372, 45)),
        ]
        results["long_request"] = long_request(blocks, host_gb, LONG_REQUEST)
    path = write_result(out, "bench-pipeline", results, options)
    print_rows("decode steps, median of 7", results["steps"])
    print_rows("the same with a copy over PCIe beside them", results["beside"])
    if not steps_only:
        print_rows("throughput", results["throughput"])
        print_rows("one long request", results["long_request"])
    for name in (
        "start_up_s",
        "profile_s",
        "handover_us",
        "launch_us",
        "handover_launch_us",
        "linear_us",
        "cpu_attention_us",
        "swap_us",
    ):
        print(name, results[name])
    print(f"written to {path}")


if __name__ == "__main__":
    main()
