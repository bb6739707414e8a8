"""A machine that is simulated, as a system to measure."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from engine.errors import ConfigError
from engine.scheduling.scheduler_config import SchedulerConfig
from engine.step_fields import step_fields
from engine.step_plan import StepPlan
from workloads.bench.system import Job, OnFinished, OnProgress
from workloads.datasets import PromptMaker
from workloads.records import RunRecord
from workloads.simulation import (
    Hardware,
    SimulatedModel,
    Simulator,
    device_kv_blocks,
    host_kv_blocks,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSystem:
    """NEO on a machine that need not be here.

    Args:
        name: The system's: `neo`, `gpu-only` and so on.
        label: For tables and files.
        hardware: The machine.
        model: The model.
        limits: The scheduler's options.
        block_size: Tokens of a KV block.
        device_blocks: KV blocks of the device; None is what fits.
        host_kv_gb: GiB of host memory for KV; None is a share of the machine's.
        gpu_memory_utilization: Share of the GPU's memory that is used.
        max_model_len: Most tokens of a request; None is what the pools hold.
        pcie_attention: Let the GPU attend to some of the rotating rows itself.
        log_steps: Folder for step logs, one a run; None for none.
    """

    name: str
    label: str
    hardware: Hardware
    model: SimulatedModel
    limits: SchedulerConfig
    block_size: int
    device_blocks: int | None
    host_kv_gb: float | None
    gpu_memory_utilization: float
    max_model_len: int | None = None
    pcie_attention: bool = False
    log_steps: Path | None = None

    @property
    def is_simulated(self) -> bool:
        """Always."""
        return True

    @property
    def num_device_blocks(self) -> int:
        """KV blocks of the device.

        Raises:
            CapacityError: The model does not fit the machine.
        """
        if self.device_blocks is not None:
            return self.device_blocks
        return device_kv_blocks(
            self.hardware,
            self.model,
            self.limits,
            block_size=self.block_size,
            gpu_memory_utilization=self.gpu_memory_utilization,
        )

    @property
    def num_host_blocks(self) -> int:
        """KV blocks of the host."""
        if self.limits.mode == "gpu-only":
            return 0
        return host_kv_blocks(
            self.hardware, self.model, block_size=self.block_size, host_kv_gb=self.host_kv_gb
        )

    @property
    def options(self) -> dict[str, Any]:
        """Machine, model and limits."""
        return {
            "kind": "simulated",
            "hardware": self.hardware.name,
            "sources": dict(self.hardware.sources),
            "model": self.model.name,
            "mode": self.limits.mode,
            "max_num_seqs": self.limits.max_num_seqs,
            "max_num_batched_tokens": self.limits.max_num_batched_tokens,
            "tpot_limit_ms": self.limits.tpot_limit_ms,
            "pcie_attention": self.pcie_attention,
            "device_kv_blocks": self.num_device_blocks,
            "host_kv_blocks": self.num_host_blocks,
            "block_size": self.block_size,
        }

    @contextlib.contextmanager
    def session(self, on_progress: OnProgress) -> Iterator["SimulatedSession"]:
        """Nothing has to be started."""
        yield SimulatedSession(self)


class SimulatedSession:
    """Runs jobs on fresh simulators.

    Args:
        system: What is simulated.
    """

    def __init__(self, system: SimulatedSystem) -> None:
        self._system = system

    @property
    def maker(self) -> PromptMaker | None:
        """Lengths are enough."""
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """Beside the options: whose step times these are."""
        system = self._system
        return {
            "hardware": system.hardware.name,
            "model_id": system.model.name,
            "tokenizer_id": None,
            "endpoint_type": "simulation",
            "device_kv_blocks": system.num_device_blocks,
            "host_kv_blocks": system.num_host_blocks,
            "block_size": system.block_size,
        }

    def run(self, job: Job, on_finished: OnFinished) -> RunRecord:
        """Serve a workload in simulated time."""
        system = self._system
        simulator = Simulator(
            system.hardware.cost_model(system.model.spec, pcie_attention=system.pcie_attention),
            system.limits,
            device_blocks=system.num_device_blocks,
            host_blocks=system.num_host_blocks,
            block_size=system.block_size,
            max_model_len=system.max_model_len,
        )
        with _step_log(system.log_steps, job.name) as log:
            simulation = simulator.run(
                job.requests,
                job.arrivals,
                max_concurrency=job.max_concurrency,
                on_step=None if log is None else StepWriter(log),
                on_finished=on_finished,
            )
        shares = simulation.shares
        return RunRecord(
            requests=simulation.records,
            duration_s=simulation.duration_s,
            details={
                "num_steps": simulation.num_steps,
                "steps_by_mode": {m.value: n for m, n in simulation.modes.items()},
                "num_preemptions": simulation.num_preemptions,
                "num_swaps": simulation.num_swaps,
                "kv_blocks_peak": simulation.peak_device_blocks,
                "host_kv_blocks_peak": simulation.peak_host_blocks,
                "cpu_busy_share": shares.cpu_busy,
                "limited_by": shares.limit,
            },
        )


class StepWriter:
    """Writes simulated steps in the format of `--log-steps`.

    Args:
        file: One JSON line a step.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._num_steps = 0

    def __call__(self, plan: StepPlan, start_s: float, simulator: Simulator) -> None:
        """Write a step that starts at a simulated time."""
        host = simulator.host_pool
        line = {
            "step": self._num_steps,
            "start_s": round(start_s, 6),
            "simulated": True,
            **step_fields(plan),
            "measured": None,
            "device_blocks": simulator.device_pool.num_used,
            "host_blocks": host.num_used if host is not None else 0,
            "error": None,
        }
        self._num_steps += 1
        self._file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def _step_log(folder: Path | None, name: str) -> Iterator[TextIO | None]:
    if folder is None:
        yield None
        return
    path = folder / f"{name}.steps.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"cannot write the step log {path}: {error.strerror}") from error
