"""The question of somebody who chooses a machine: what would offloading gain on it, and why.

Each machine serves the same workload in simulation, all requests at once, on the device alone and
with the scheduler free to choose.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from engine.errors import CapacityError
from workloads.drivers.simulated import SimulatedSystem
from workloads.request import WorkloadRequest
from workloads.simulation import Simulator
from workloads.simulation.simulator import Simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineReport:
    """What was found for one machine; `problem` is all there is if the model does not fit.

    Args:
        machine: Its name.
        device_kv_tokens: Room for KV on the GPU.
        host_kv_tokens: Room for KV on the host.
        gpu_only: Requests a second on the device alone.
        neo: The same with the scheduler free to choose.
        best_mode: The mode of most of its steps then.
        limited_by: What takes most of the time then.
        problem: Why nothing could be simulated.
    """

    machine: str
    device_kv_tokens: int = 0
    host_kv_tokens: int = 0
    gpu_only: float = 0.0
    neo: float = 0.0
    best_mode: str = ""
    limited_by: str = ""
    problem: str | None = None

    @property
    def gain(self) -> float | None:
        """Throughput with offloading over that without; None if nothing ran without."""
        return self.neo / self.gpu_only if self.gpu_only else None


def survey(
    machines: Sequence[SimulatedSystem], requests: Sequence[WorkloadRequest]
) -> Iterator[MachineReport]:
    """Yield a report for each machine.

    Args:
        machines: Systems whose scheduler is free to choose, one a machine.
        requests: The workload.
    """
    for system in machines:
        try:
            yield _report(system, requests)
        except CapacityError as error:
            yield MachineReport(machine=system.hardware.name, problem=str(error))


def _report(system: SimulatedSystem, requests: Sequence[WorkloadRequest]) -> MachineReport:
    limits = replace(system.limits, mode="gpu-only")
    alone = _simulate(replace(system, limits=limits), requests)
    free = _simulate(system, requests)
    mode, _ = free.modes.most_common(1)[0]
    return MachineReport(
        machine=system.hardware.name,
        device_kv_tokens=system.num_device_blocks * system.block_size,
        host_kv_tokens=system.num_host_blocks * system.block_size,
        gpu_only=alone.requests_per_s,
        neo=free.requests_per_s,
        best_mode=mode.value,
        limited_by=free.shares.limit,
    )


def _simulate(system: SimulatedSystem, requests: Sequence[WorkloadRequest]) -> Simulation:
    simulator = Simulator(
        system.hardware.cost_model(system.model.spec),
        system.limits,
        device_blocks=system.num_device_blocks,
        host_blocks=system.num_host_blocks,
        block_size=system.block_size,
        max_model_len=system.max_model_len,
    )
    return simulator.run(requests)
