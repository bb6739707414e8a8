"""Host memory for KV: how much there is, and how it is taken.

The memory is mapped with large pages and not touched here: whoever attends to it touches it first,
so that on machines with several memory nodes it lies near the threads that read it.
"""

import mmap
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def cgroup_limit_bytes() -> int | None:
    """Return the memory limit of this process's container, None if there is none."""
    return _read_number(_CGROUP / "memory.max")


def available_host_bytes() -> int:
    """Return the host memory that can be taken without swapping, within the container's limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = cgroup_limit_bytes(), _read_number(_CGROUP / "memory.current")
    return available if limit is None else min(available, max(0, limit - (used or 0)))


def allocate_host_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Map zeroed host memory, in large pages where the system has them.

    Args:
        shape: Of the tensor; at least one element.
        dtype: Its type.

    Returns:
        A contiguous CPU tensor; its pages are made when they are first touched.

    Raises:
        OSError: The system refuses.
    """
    num_elements = torch.Size(shape).numel()
    memory = mmap.mmap(-1, num_elements * dtype.itemsize)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def pin(tensor: torch.Tensor) -> None:
    """Lock a CPU tensor's memory and make it reachable from CUDA GPUs.

    Raises:
        OSError: The memory cannot be locked; the limit on locked memory is a common reason.
    """
    num_bytes = tensor.numel() * tensor.element_size()
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), num_bytes, 0))
    if code != 0:
        raise OSError(f"CUDA error {code} in pinning {num_bytes / 2**30:.2f} GiB")


def unpin(tensor: torch.Tensor) -> None:
    """Undo `pin`; the GPU must not use the memory any more."""
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
