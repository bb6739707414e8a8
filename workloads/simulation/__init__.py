"""Serving in simulated time: the real scheduler and block accounting on a cost model."""

from workloads.simulation.hardware import Hardware, hardware_names, load_hardware
from workloads.simulation.simulator import Simulator
from workloads.simulation.sizing import SimulatedModel, device_kv_blocks, host_kv_blocks

__all__ = [
    "Hardware",
    "SimulatedModel",
    "Simulator",
    "device_kv_blocks",
    "hardware_names",
    "host_kv_blocks",
    "load_hardware",
]
