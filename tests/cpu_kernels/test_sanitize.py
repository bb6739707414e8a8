"""The C++ tests of thread pool and service, built with each sanitizer by `make sanitize`."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cpu_kernels.compilers import find_cxx

ROOT = Path(__file__).parents[2]


def has_runtime(kind: str, folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [find_cxx(), f"-fsanitize={kind}", source, "-o", folder / "empty"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("kind", ["thread", "address,undefined"])
def test_clean_under(kind: str, tmp_path: Path) -> None:
    if not has_runtime(kind, tmp_path):
        pytest.skip(f"the compiler lacks the runtime of -fsanitize={kind}")
    command = ["make", "-s", "sanitize", f"SANITIZERS={kind}", f"CXX={find_cxx()}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "thread pool and attention service: passed" in done.stdout
