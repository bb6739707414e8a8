"""A short soak; `python -m tests.engine.soak` runs the same at length."""

from pathlib import Path

import pytest

from tests.engine.soak import (
    PCIE,
    SOAKED,
    Soak,
    expected_tokens,
    make_model,
    make_prompts,
    print_soaks,
    soak,
)

pytestmark = pytest.mark.ispc

LEAST_STEPS = 250


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("soak"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts(seed=1)


@pytest.fixture(scope="module")
def expected(folder: Path, prompts) -> list[list[int]]:
    return expected_tokens(folder, "cpu", prompts)


@pytest.mark.parametrize("mode", SOAKED)
def test_random_arrivals_and_cancellations_change_no_token(
    folder: Path, prompts, expected, mode: str, capsys
) -> None:
    found = soak(folder, "cpu", mode, 0.0, prompts, expected, least_steps=LEAST_STEPS)
    assert found.faults == []
    assert found.num_cancelled > 0
    assert found.num_requests > found.num_cancelled
    if mode in ("overlap", PCIE):
        assert found.rows["rotating"] > 0
    if mode == "asymmetric":
        assert found.rows["cdec"] > 0
    print_soaks([found])
    assert "none" in capsys.readouterr().out


def test_a_wrong_token_is_found(folder: Path, prompts, expected) -> None:
    shifted = expected[1:] + expected[:1]
    found = soak(folder, "cpu", "gpu-only", 0.0, prompts, shifted, least_steps=50)
    assert found.faults
    assert "prompt" in found.faults[0]


def test_growing_memory_is_found() -> None:
    grown = [2**30] * 2 + [2**30 + n * 2**25 for n in range(6)]
    assert Soak("auto", resident_bytes=grown).faults == ["host memory grew by 160 MiB"]
    assert Soak("auto", device_bytes=grown[:3]).faults == []
