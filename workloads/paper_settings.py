"""The NEO paper's settings on this machine's GPU, and what the simulator predicts for the same.

Two settings (arXiv 2411.01142), with dummy weights in the models' true shapes: Llama-3-8B with
26,400 tokens of KV on the device, 1,000 tokens in and 50 to 400 out (figure 10a, an A10G's room);
Llama-2-7B with 864 tokens, the summarize workload (figure 6c, a T4's room). Every point is measured
through the engine in this process, then simulated twice: from the machine's data, and from the cost
tables that the engine measured. An interrupted run goes on where it stopped.
"""

import argparse
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.scheduling.scheduler_config import SchedulerConfig
from workloads.bench.config import BenchConfig
from workloads.bench.sweep import PointResult, Sweep
from workloads.bench.system import System
from workloads.datasets import DatasetConfig
from workloads.drivers.simulated import SimulatedSystem
from workloads.model_shapes import model_shape_folder
from workloads.result_file import write_json, write_result
from workloads.simulation import Hardware, SimulatedModel, load_hardware

NAME = "paper-settings"
SYSTEMS = {"gpu-only": "gpu-only", "neo": "auto"}
MACHINE = "h200-16cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model's shape, its room for KV, and a workload.

    `vllm` holds requests/s by output length (0 for the data set's own), measured with vLLM 0.23.0
    on one H200.
    """

    name: str
    folder: Path
    device_kv_blocks: int
    host_kv_gb: float
    max_num_batched_tokens: int
    max_model_len: int
    dataset: DatasetConfig
    output_lens: tuple[int, ...]
    vllm: Mapping[int, float]

    def engine(self, mode: str) -> EngineConfig:
        """Return the engine's options."""
        return EngineConfig(
            model=str(self.folder),
            load_format="dummy",
            max_model_len=self.max_model_len,
            device_kv_blocks=self.device_kv_blocks,
            host_kv_gb=self.host_kv_gb,
            scheduler=SchedulerConfig(
                mode=mode, max_num_batched_tokens=self.max_num_batched_tokens
            ),
        )


SETTINGS = {
    "llama-2-7b": Setting(
        name="llama-2-7b",
        folder=model_shape_folder("llama-2-7b"),
        device_kv_blocks=54,
        host_kv_gb=48.0,
        max_num_batched_tokens=832,
        max_model_len=832,
        dataset=DatasetConfig(dataset_name="summarize", num_prompts=300),
        output_lens=(),
        vllm={0: 6.84},
    ),
    "llama-3-8b": Setting(
        name="llama-3-8b",
        folder=model_shape_folder("llama-3-8b"),
        device_kv_blocks=1650,
        host_kv_gb=32.0,
        max_num_batched_tokens=512,  # more of a prompt rides along with decodes than with 2,048
        max_model_len=8192,
        dataset=DatasetConfig(num_prompts=200),
        output_lens=(50, 100, 200, 300, 400),
        vllm={50: 28.84, 100: 20.51, 200: 12.90, 300: 9.08, 400: 6.79},
    ),
}


class Run:
    """One call: measures what is missing until its time is up.

    Args:
        out: Gets one file with all points.
        work: Holds a file a point, and the cost tables.
        deadline: On the clock of `time.monotonic`; no point is begun after it.
        settings: By name.
        machine: The one that this is, among those to simulate.
        request_rates: Requests a second of the points.
        systems: Names of those to measure.
        log_steps: Whether to write the measured steps beside the results.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        deadline: float,
        settings: Mapping[str, Setting] = SETTINGS,
        machine: str = MACHINE,
        request_rates: tuple[float, ...] = (math.inf,),
        systems: Collection[str] = tuple(SYSTEMS),
        *,
        log_steps: bool = False,
    ) -> None:
        self._request_rates = request_rates
        self._systems = {name: SYSTEMS[name] for name in systems}
        self._log_steps = log_steps
        self._settings = settings
        self._machine = machine
        self._out = out
        self._work = work
        self._deadline = deadline
        self._points: dict[str, dict[str, Any]] = {}
        self.is_complete = True

    def restore(self, path: Path) -> None:
        """Take over the points of an earlier call's file."""
        content = json.loads(path.read_text())
        for point in content["results"]:
            if point["label"] in SYSTEMS:  # predictions are made again: the simulator may be newer
                write_json(self._work / f"{point['file']}.json", point)
                self._points[point["file"]] = point
        for model, tables in content["options"].get("tables", {}).items():
            write_json(self._tables(model), tables)

    def measure(self, setting: Setting) -> None:
        """Measure a setting on every system."""
        from workloads.drivers.in_process import InProcessSystem  # noqa: PLC0415 (CUDA)

        # The system with a host pool comes first: it measures the tables for both.
        for name, mode in reversed(self._systems.items()):
            measured = InProcessSystem(
                name=name,
                config=self._logged(setting, name, mode),
                tables=self._tables(setting.name) if name == "neo" else None,
            )
            self._sweep(setting, measured)

    def _logged(self, setting: Setting, name: str, mode: str) -> EngineConfig:
        path = None
        if self._log_steps:
            self._out.mkdir(parents=True, exist_ok=True)
            path = self._out / f"{setting.name}-{name}.steps.jsonl"
        return replace(setting.engine(mode), log_steps=path)

    def simulate(self, setting: Setting) -> None:
        """Simulate a setting on every system."""
        machines = {"machine": self._machine, "tables": str(self._tables(setting.name))}
        for kind, machine in machines.items():
            if kind == "tables" and not Path(machine).exists():
                continue
            hardware = load_hardware(machine)
            for name, mode in self._systems.items():
                label = f"{name}, simulated from {kind}"
                self._sweep(setting, _simulated(setting, name, mode, hardware, label))

    def _tables(self, model: str) -> Path:
        return self._work / "tables" / f"{model}.json"

    def _sweep(self, setting: Setting, system: System) -> None:
        if not self.is_complete:
            return
        config = BenchConfig(
            dataset=setting.dataset,
            output_lens=setting.output_lens,
            request_rates=self._request_rates,
            result_dir=self._work,
            metadata={"setting": setting.name},
        )
        for result in self._until_late(Sweep(config, [system], print)):
            self._keep(result)
            rate = result.figures["request_throughput"]
            print(f"{result.path.stem}: {rate:.2f} requests/s", flush=True)

    def _until_late(self, sweep: Sweep) -> Iterator[PointResult]:
        for result in sweep.run():
            yield result
            if time.monotonic() > self._deadline and not result.was_kept:
                self.is_complete = False
                return

    def _keep(self, result: PointResult) -> None:
        """Add a point to the one file; it is whole after every point."""
        self._points[result.path.stem] = {**result.figures, "file": result.path.stem}
        tables = {
            model: json.loads(self._tables(model).read_text())
            for model in self._settings
            if self._tables(model).exists()
        }
        write_result(self._out, NAME, list(self._points.values()), {"tables": tables})

    def print_table(self) -> None:
        """Print measured beside predicted throughput."""
        table = Table(title="requests/s, measured and predicted", title_justify="left")
        for name in ("setting", "system", "out", "asked", "measured", "vLLM 0.23.0, H200"):
            table.add_column(name)
        for kind in ("machine", "tables"):
            table.add_column(f"simulated from {kind}", justify="right")
        rates = {
            (p["setting"], p["label"], p["output_len"] or 0, str(p["request_rate"])): p[
                "request_throughput"
            ]
            for p in self._points.values()
        }
        for (setting, label, length, asked), rate in rates.items():
            if label not in SYSTEMS:
                continue
            cells = [setting, label, str(length or "own"), asked, f"{rate:.2f}"]
            vllm = self._settings[setting].vllm.get(length) if asked == "inf" else None
            cells.append("" if vllm is None else f"{vllm:.2f}")
            for kind in ("machine", "tables"):
                found = rates.get((setting, f"{label}, simulated from {kind}", length, asked))
                cells.append("" if found is None else f"{found:.2f} ({found / rate - 1:+.0%})")
            table.add_row(*cells)
        Console(width=120).print(table)


def _simulated(
    setting: Setting, name: str, mode: str, hardware: Hardware, label: str
) -> SimulatedSystem:
    config = setting.engine(mode)
    return SimulatedSystem(
        name=name,
        label=label,
        hardware=hardware,
        model=SimulatedModel.open(str(setting.folder)),
        limits=config.scheduler,
        block_size=config.block_size,
        device_blocks=setting.device_kv_blocks,
        host_kv_gb=setting.host_kv_gb,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_model_len=setting.max_model_len,
    )


def main() -> None:
    """Measure, simulate, print and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("workloads/results"))
    parser.add_argument("--work", type=Path, default=Path("bench-results/paper-settings"))
    parser.add_argument("--resume", type=Path, help="result file of an interrupted run")
    parser.add_argument("--minutes", type=float, default=7.0, help="no point is begun after that")
    parser.add_argument("--machine", default=MACHINE, help="name or file, as of neo bench")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--simulate-only", action="store_true", help="predict again what --resume holds"
    )
    parser.add_argument(
        "--request-rate", default="inf", help="requests a second, separated by commas"
    )
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--num-prompts", type=int, help="requests, instead of the settings' own")
    parser.add_argument("--log-steps", action="store_true", help="write the measured steps, too")
    arguments = parser.parse_args()
    run = Run(
        arguments.out,
        arguments.work,
        deadline=time.monotonic() + 60 * arguments.minutes,
        machine=arguments.machine,
        request_rates=tuple(float(rate) for rate in arguments.request_rate.split(",")),
        systems=arguments.systems,
        log_steps=arguments.log_steps,
    )
    if arguments.resume is not None:
        run.restore(arguments.resume)
    for name in arguments.settings:
        setting = SETTINGS[name]
        if arguments.num_prompts is not None:
            dataset = replace(setting.dataset, num_prompts=arguments.num_prompts)
            setting = replace(setting, dataset=dataset)
        if not arguments.simulate_only:
            run.measure(setting)
        run.simulate(setting)
    run.print_table()
    if not run.is_complete:
        print(f"time is up: go on with --resume {arguments.out / NAME}.json")


if __name__ == "__main__":
    main()
