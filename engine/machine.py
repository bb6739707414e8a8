"""What NEO finds on a machine: processor, memory, GPUs, compilers, limits.

Facts only; `neo info` prints them and result files carry them.
"""

import os
import platform
import re
import resource
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch

from engine.host_memory import available_host_bytes, cgroup_limit_bytes

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_PACKAGES = ("torch", "triton", "transformers", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One CUDA GPU; memory in bytes."""

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: str
    num_multiprocessors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found.

    Args:
        python: Version of the interpreter.
        packages: Name and version of the main packages, None where missing.
        cpu: Model name of the processor.
        num_cores: Cores this process may use.
        vector_isa: The widest vector instructions that NEO has kernels for.
        memory_total_bytes: Host memory, or the container's limit if lower.
        memory_available_bytes: Of it, what can be had without swapping.
        memlock_limit_bytes: Most memory that may be pinned; None is unlimited.
        transparent_hugepages: The kernel's setting.
        gpus: CUDA GPUs that torch sees.
        gpu_driver: Version of NVIDIA's driver, None without one.
        cuda: CUDA version that torch was built for.
        cxx: C++ compiler.
        ispc: ISPC compiler on the PATH or in `$ISPC`.
    """

    python: str
    packages: dict[str, str | None]
    cpu: str
    num_cores: int
    vector_isa: str
    memory_total_bytes: int
    memory_available_bytes: int
    memlock_limit_bytes: int | None
    transparent_hugepages: str
    gpus: list[Gpu]
    gpu_driver: str | None
    cuda: str | None
    cxx: str | None
    ispc: str | None


def find_machine() -> Machine:
    """Look at this machine."""
    memory = psutil.virtual_memory()
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    cpu, flags = _cpu()
    return Machine(
        python=sys.version.split()[0],
        packages={name: _version(name) for name in _PACKAGES},
        cpu=cpu,
        num_cores=len(os.sched_getaffinity(0)),
        vector_isa=_vector_isa(flags),
        memory_total_bytes=min(memory.total, cgroup_limit_bytes() or memory.total),
        memory_available_bytes=available_host_bytes(),
        memlock_limit_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        transparent_hugepages=_transparent_hugepages(),
        gpus=_gpus(),
        gpu_driver=_gpu_driver(),
        cuda=torch.version.cuda,
        cxx=shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"),
        ispc=os.environ.get("ISPC") or shutil.which("ispc"),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's model name."""
    return _cpu()[0]


def _cpu() -> tuple[str, frozenset[str]]:
    """Return the processor's name and its feature flags."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
    return name, flags


def _vector_isa(flags: frozenset[str]) -> str:
    if platform.machine() == "aarch64":
        return "NEON"
    if "amx_bf16" in flags or "avx512_fp16" in flags:
        return "AVX-512 (Sapphire Rapids)"
    if "avx512bw" in flags:
        return "AVX-512"
    return "AVX2" if "avx2" in flags else "none that NEO supports (AVX2 is needed)"


def _transparent_hugepages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"


def _gpu_driver() -> str | None:
    try:
        first_line = _DRIVER_FILE.read_text().partition("\n")[0]
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", first_line)
    return found[0] if found else None


def _gpus() -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            Gpu(
                name=properties.name,
                total_bytes=total,
                free_bytes=free,
                compute_capability=f"{properties.major}.{properties.minor}",
                num_multiprocessors=properties.multi_processor_count,
            )
        )
    return found
