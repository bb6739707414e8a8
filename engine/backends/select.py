"""Choosing the device: explicit, or CUDA where there is one."""

import torch

from engine.backends.base import Backend
from engine.backends.cpu import CpuBackend
from engine.errors import ConfigError


def resolve_device(device: str) -> torch.device:
    """Return the device that an option means.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: CUDA was asked for and is not there, or not that many GPUs.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    index = int(device.partition(":")[2] or 0)
    if index >= num_gpus:
        raise ConfigError(
            f"device {device} was asked for, but torch {torch.__version__} sees {num_gpus} CUDA "
            "GPUs; use --device cpu, or install a driver and a CUDA build of torch"
        )
    return torch.device("cuda", index)


def make_backend(device: torch.device, num_threads: int | None) -> Backend:
    """Return the backend of a device.

    Args:
        device: From `resolve_device`.
        num_threads: CPU attention threads; None is all cores but one.

    Raises:
        ConfigError: The CPU kernels are needed and not built.
    """
    if device.type == "cuda":
        from engine.backends.cuda import CudaBackend  # noqa: PLC0415 (Triton)

        return CudaBackend(device, num_threads)
    return CpuBackend(num_threads)
