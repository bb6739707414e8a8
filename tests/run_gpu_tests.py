"""`make test-gpu`: run every test that needs a GPU, and fail if one of them was skipped.

The GPU machine's packages are its own, so a warning of theirs is not an error here, and only the
folders that hold such tests are read: others import what serving and development need.
"""

import sys
from pathlib import Path

import pytest

FOLDERS = ("tests/engine", "tests/gpu_kernels")


class SkipCounter:
    """Counts skipped tests."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.reasons.append(f"{report.nodeid}: {report.longrepr}")


def main() -> int:
    counter = SkipCounter()
    named = any(Path(argument.split("::")[0]).exists() for argument in sys.argv[1:])
    paths = [*sys.argv[1:], *(() if named else FOLDERS)]
    arguments = ["-m", "gpu", "-W", "default", "-p", "no:cacheprovider", *paths]
    code = pytest.main(arguments, plugins=[counter])
    if counter.reasons:
        print(f"FAILED: {len(counter.reasons)} GPU tests were skipped, first {counter.reasons[0]}")
        return 1
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
