"""Find what builds the CPU kernels besides ISPC: C++ compiler, CMake, Ninja, pybind11, headers."""

import hashlib
import importlib.metadata
import os
import shutil
import sysconfig
from pathlib import Path

import pybind11

from cpu_kernels.errors import KernelBuildError


def find_cxx() -> Path:
    """Return the C++ compiler: `$CXX`, else c++, g++ or clang++ on PATH.

    Raises:
        KernelBuildError: There is none.
    """
    if explicit := os.environ.get("CXX"):
        if found := shutil.which(explicit):
            return Path(found)
        raise KernelBuildError(f"CXX={explicit} is not an executable file; set CXX=/path/to/g++")
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return Path(found)
    raise KernelBuildError(
        "no C++ compiler: install one (Debian, Ubuntu: apt install g++; "
        "Fedora: dnf install gcc-c++) or set CXX=/path/to/g++"
    )


def find_tool(name: str) -> Path:
    """Return `cmake` or `ninja`: the one beside this Python, else the one on PATH.

    Raises:
        KernelBuildError: There is none.
    """
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise KernelBuildError(f"{name} is missing: pip install {name}")
    return Path(found)


def include_dirs() -> list[Path]:
    """Return the folders of Python's and pybind11's headers.

    Raises:
        KernelBuildError: Python was installed without its headers.
    """
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise KernelBuildError(
            f"Python's headers are missing ({python}/Python.h): install them "
            "(Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
        )
    return [python, Path(pybind11.get_include())]


def pybind11_cmake_dir() -> Path:
    """Return the folder of pybind11's CMake package."""
    return Path(pybind11.get_cmake_dir())


def python_abi() -> str:
    """Return what a compiled module depends on in Python: its ABI tag and pybind11's version."""
    return f"{sysconfig.get_config_var('SOABI')} pybind11 {importlib.metadata.version('pybind11')}"


def identity(tool: Path) -> str:
    """Return a text that changes when an executable is replaced, without running it."""
    real = tool.resolve()
    stat = real.stat()
    return f"{real} {stat.st_size} {stat.st_mtime_ns}"


def digest(*parts: str | bytes) -> str:
    """Return a short hash of the parts, in order."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:12]
