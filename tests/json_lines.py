"""Modules that print JSON lines, run in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton
from packaging.version import Version

_ROOT = Path(__file__).resolve().parents[1]


def json_lines(module: str, *args: str, **environment: str) -> list[dict[str, Any]]:
    """Run a module and return what it prints."""
    finished = subprocess.run(
        [sys.executable, "-m", module, *args],
        env={**os.environ, **environment},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def interpreted_json_lines(module: str, *args: str) -> list[dict[str, Any]]:
    """Do the same with Triton's interpreter; its switch counts only before triton is imported."""
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("Triton before 3.7 cannot interpret loops with numpy 2.4 or newer")
    return json_lines(module, *args, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
