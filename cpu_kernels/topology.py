"""Which cores the attention threads get."""

import os
from collections.abc import Collection
from pathlib import Path

CPU_DIR = Path("/sys/devices/system/cpu")


def _core_of(cpu: int) -> tuple[str, str]:
    """Return (package, core) of a logical CPU; a CPU without topology is its own core."""
    folder = CPU_DIR / f"cpu{cpu}" / "topology"
    try:
        package = (folder / "physical_package_id").read_text().strip()
        return package, (folder / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def available_cpus() -> list[int]:
    """Return the logical CPUs this process may use: one of each core first, then the siblings."""
    cpus = sorted(os.sched_getaffinity(0))
    first: dict[tuple[str, str], int] = {}
    for cpu in cpus:
        first.setdefault(_core_of(cpu), cpu)
    leaders = list(first.values())
    return leaders + [cpu for cpu in cpus if cpu not in set(leaders)]


def num_available_cores() -> int:
    """Return the number of physical cores this process may use."""
    return len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})


def default_num_threads() -> int:
    """Return the cores but one, which is left to the engine; at least 1.

    With all cores busy, plain reading loses a fifth of its bandwidth to whatever shares a core.
    """
    return max(1, num_available_cores() - 1)


def attention_cpus(num_threads: int) -> list[int]:
    """Return the CPU of each thread; the first core stays free while there are others."""
    cpus = available_cpus()
    if num_threads < len(cpus):
        return cpus[1 : num_threads + 1]
    return [cpus[i % len(cpus)] for i in range(num_threads)]


def keep_off(cpus: Collection[int]) -> set[int] | None:
    """Keep the calling thread, and threads that it starts from now on, off CPUs.

    Args:
        cpus: Those of the attention threads. A thread that the system puts beside one of them
            costs both of them whole time slices, and all threads wait for the slowest.

    Returns:
        The CPUs it had, for `os.sched_setaffinity(0, ...)`; None if nothing was changed, because it
        would have none left.
    """
    before = os.sched_getaffinity(0)
    left = before - set(cpus)
    if not left or left == before:
        return None
    try:
        os.sched_setaffinity(0, left)
    except OSError:  # best effort, like the threads' own
        return None
    return before
