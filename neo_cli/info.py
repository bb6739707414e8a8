"""`neo info`: what was found on this machine and what NEO will use."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neo_cli.two_columns import print_two_columns

if TYPE_CHECKING:
    from engine.machine import Machine


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what NEO finds on this machine and what it will use."""
    from dataclasses import asdict

    from cpu_kernels.build import find_built
    from engine.checkpoint import DEFAULT_MODEL_NAME
    from engine.machine import find_machine
    from engine.paths import cache_dir

    machine = find_machine()
    kernels = find_built(cache_dir())
    facts: dict[str, Any] = {
        **asdict(machine),
        "cache_dir": str(cache_dir()),
        "cpu_kernels": str(kernels) if kernels else None,
        "default_model": DEFAULT_MODEL_NAME,
        "device": "cuda" if machine.gpus else "cpu",
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print_two_columns(_rows(machine, facts))


def _rows(machine: "Machine", facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("CPU", f"{machine.cpu}, {machine.num_cores} cores, {machine.vector_isa}"),
        (
            "memory",
            f"{_gib(machine.memory_total_bytes)}, {_gib(machine.memory_available_bytes)} available",
        ),
        ("pinnable memory", _memlock(machine.memlock_limit_bytes)),
        ("transparent hugepages", machine.transparent_hugepages),
        *[("GPU", _gpu(gpu)) for gpu in machine.gpus],
        *([] if machine.gpus else [("GPU", "none that torch can use")]),
        *([("GPU driver", machine.gpu_driver)] if machine.gpu_driver else []),
        ("device", f"{facts['device']} (what --device auto takes)"),
        ("Python", machine.python),
        ("packages", ", ".join(f"{k} {v or 'missing'}" for k, v in machine.packages.items())),
        ("C++ compiler", machine.cxx or "none: install g++ or clang++"),
        ("ISPC compiler", machine.ispc or "none on PATH; neo build-kernels installs one"),
        ("CPU kernels", facts["cpu_kernels"] or "not built: run neo build-kernels"),
        ("cache folder", facts["cache_dir"]),
        ("default model", facts["default_model"]),
    ]


def _gpu(gpu: Any) -> str:
    return (
        f"{gpu.name}, {_gib(gpu.total_bytes)}, {_gib(gpu.free_bytes)} free, "
        f"compute capability {gpu.compute_capability}"
    )


def _memlock(limit: int | None) -> str:
    return "unlimited" if limit is None else _gib(limit)


def _gib(num_bytes: int) -> str:
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"
