"""`--log-steps`: one JSON line a step, so that every decision can be explained afterwards."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from engine.errors import ConfigError
from engine.runner import ModelRunner
from engine.step_fields import step_fields
from engine.step_in_flight import StepResult
from engine.step_plan import StepPlan

StepObserver = Callable[[StepPlan, StepResult | None, ModelRunner, str | None], None]
"""Called with a step's plan, what was measured (None if it failed), the runner, and its error."""


class StepLog:
    """Writes what was planned and what was measured.

    Args:
        path: Created or overwritten.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: TextIO = path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(f"cannot write the step log {path}: {error.strerror}") from error
        self._num_steps = 0

    def write(
        self, plan: StepPlan, result: StepResult | None, runner: ModelRunner, error: str | None
    ) -> None:
        """Write one step.

        Args:
            plan: What was to be done.
            result: What was measured; None if the step failed.
            runner: Whose pools are in use.
            error: Why it failed.
        """
        now = time.time()
        line = {
            "step": self._num_steps,
            "time_s": round(now, 6),
            "start_s": round(now - (result.step_s if result is not None else 0.0), 6),
            **step_fields(plan),
            "measured": None if result is None else _measured(result),
            "device_blocks": runner.pool.num_used,
            "host_blocks": runner.host_pool.num_used if runner.host_pool else 0,
            "error": error,
        }
        self._num_steps += 1
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _measured(result: StepResult) -> dict[str, object]:
    measured: dict[str, object] = {
        "step_s": result.step_s,
        "launch_s": result.launch_s,
        "device_s": result.device_s,
        "device_busy_s": result.device_busy_s,
        "is_graph": result.is_graph,
        "graph_rows": result.graph_rows,
        "captured": result.captured,
    }
    if result.host is not None:
        measured |= asdict(result.host)
    return measured
