"""Compiles every kernel for sm_90 without a GPU: it must use the matrix units and not spill."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOPPER_SHARED_BYTES = 227 * 1024

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.gpu_kernels.compile_offline", "90", "--serving"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def test_every_kernel_compiles_and_fits(kernels: list[dict[str, Any]]) -> None:
    assert len({row["kernel"] for row in kernels}) == 14
    for row in kernels:
        assert row["shared_bytes"] <= HOPPER_SHARED_BYTES, row


def test_nothing_spills_much(kernels: list[dict[str, Any]]) -> None:
    # Prefill trades a few spilled words for a second program a multiprocessor.
    for row in kernels:
        assert row["stack_bytes"] <= 128, row


def test_attention_uses_the_matrix_units(kernels: list[dict[str, Any]]) -> None:
    for row in kernels:
        if row["kernel"] == "prefill_attention_kernel":
            assert row["mma"] == "wgmma.mma_async", row
        if row["kernel"] == "decode_attention_kernel":
            assert row["mma"] == "mma.sync", row


def test_run_time_values_compile_nothing_new(kernels: list[dict[str, Any]]) -> None:
    assert [row for row in kernels if row["phase"] == "serving"] == []
