"""Smoke test of each kernel under Triton's interpreter, in one process of its own."""

import pytest

from tests.gpu_kernels.interpreter_cases import CASES
from tests.json_lines import interpreted_json_lines


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    lines = interpreted_json_lines("tests.gpu_kernels.interpreter_cases")
    return {line["case"]: line["error"] for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_kernel_in_the_interpreter(results: dict[str, str], case: str) -> None:
    assert results[case] == ""
