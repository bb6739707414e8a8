"""Compiles every kernel for sm_90 without a GPU: it must use the matrix units and not spill."""

from typing import Any

import pytest

from tests.json_lines import json_lines

HOPPER_SHARED_BYTES = 227 * 1024

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    return json_lines("tests.gpu_kernels.compile_offline", "90", "--serving")


def test_every_kernel_compiles_and_fits(kernels: list[dict[str, Any]]) -> None:
    assert len({row["kernel"] for row in kernels}) == 17
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
        if row["kernel"] in ("decode_attention_kernel", "host_pool_attention_kernel"):
            assert row["mma"] == "mma.sync", row


def test_attention_over_pcie_leaves_room_for_others(kernels: list[dict[str, Any]]) -> None:
    """Two programs of the linear layers fit beside it on a multiprocessor, 96 KiB each at most."""
    [row] = [row for row in kernels if row["kernel"] == "host_pool_attention_kernel"]
    assert row["constants"]["num_warps"] == 1
    assert row["shared_bytes"] + 2 * 96 * 1024 <= HOPPER_SHARED_BYTES


def test_attention_over_pcie_fits_with_the_largest_tiles() -> None:
    rows = json_lines("tests.gpu_kernels.compile_offline", "90", "--large")
    [row] = [row for row in rows if row["kernel"] == "host_pool_attention_kernel"]
    assert row["shared_bytes"] <= HOPPER_SHARED_BYTES


def test_run_time_values_compile_nothing_new(kernels: list[dict[str, Any]]) -> None:
    assert [row for row in kernels if row["phase"] == "serving"] == []
