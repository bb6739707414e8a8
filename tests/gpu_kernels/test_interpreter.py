"""Smoke test of each kernel under Triton's interpreter, in one process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import triton
from packaging.version import Version

from tests.gpu_kernels.interpreter_cases import CASES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("Triton before 3.7 cannot interpret loops with numpy 2.4 or newer")
    finished = subprocess.run(
        [sys.executable, "-m", "tests.gpu_kernels.interpreter_cases"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    return {line["case"]: line["error"] for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_kernel_in_the_interpreter(results: dict[str, str], case: str) -> None:
    assert results[case] == ""
