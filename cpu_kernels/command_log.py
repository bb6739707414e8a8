"""Run the commands of a build and turn a failure into one line."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from cpu_kernels.errors import KernelBuildError


class CommandLog:
    """Runs build commands, keeps their output in a file and reports their progress.

    Args:
        log: File to start afresh.
        verbose: Report every line, not only the build tool's numbered steps.
        on_progress: Called with each line to report.
    """

    def __init__(self, log: Path, verbose: bool, on_progress: Callable[[str], None]) -> None:
        self.log = log
        self.verbose = verbose
        self.on_progress = on_progress
        log.write_text("")

    def run(self, command: list[str]) -> None:
        """Run one command; raise KernelBuildError with the first error it printed if it fails."""
        lines = [" ".join(command)]
        pipe, out = subprocess.PIPE, subprocess.STDOUT
        with subprocess.Popen(command, stdout=pipe, stderr=out, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                if self.verbose or line.startswith("["):
                    self.on_progress(line.rstrip())
        with self.log.open("a") as log:
            log.write("\n".join(lines) + "\n")
        # --werror does not cover these in every ISPC release, and one costs a factor of ten.
        slow = any("Performance Warning" in line for line in lines)
        if process.returncode or slow:
            marks = (
                "error:",
                "Error:",
                "CMake Error",
                "Performance Warning",
                "undefined reference",
            )
            said = next((line for line in lines[1:] if any(mark in line for mark in marks)), "")
            reason = " ".join((said or lines[-1]).split())
            raise KernelBuildError(f"compiling the CPU kernels failed: {reason} (log: {self.log})")
