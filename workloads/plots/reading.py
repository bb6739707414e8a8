"""Reads result files and step logs."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

_NEEDED = ("label", "request_rate", "request_throughput")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of a step log, as far as figures need it; times in seconds.

    `device_s` is the device's share of the step, `waiting_s` what of that it waits for the host,
    `cpu_s` the CPU's attention in it; `simulated` says that they are predictions.
    """

    start_s: float
    step_s: float
    device_s: float
    waiting_s: float
    cpu_s: float
    mode: str
    has_prefill: bool
    device_blocks: int
    host_blocks: int
    simulated: bool

    @property
    def busy_s(self) -> float:
        """The device's time without its waiting for the host."""
        return self.device_s - self.waiting_s


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the points of result files, and of all result files in folders.

    Raises:
        ConfigError: A file is no result of `neo bench` or `vllm bench serve`, or there is none.
    """
    found = []
    for path in paths:
        files = sorted(path.glob("*.json"), key=_natural) if path.is_dir() else [path]
        for file in files:
            points = _points(_read_json(file))
            if not points and not path.is_dir():
                raise ConfigError(
                    f"{file} is no result of neo bench: it must have {', '.join(_NEEDED)}"
                )
            found += [_with_label(point, file) for point in points]
    if not found:
        named = ", ".join(map(str, paths)) or "no file"
        raise ConfigError(f"there are no results of neo bench in {named}")
    return found


def read_steps(path: Path) -> list[StepRecord]:
    """Read a step log; steps that failed are left out.

    Raises:
        ConfigError: The file cannot be read, or a line is no step.
    """
    steps = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"step log {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            step = _step(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"step log {path}, line {number}: not a step ({type(error).__name__}: {error})"
            ) from error
        if step is not None:
            steps.append(step)
    if not steps:
        raise ConfigError(f"step log {path} holds no steps")
    return steps


def _step(line: dict[str, Any]) -> StepRecord | None:
    measured, predicted = line.get("measured"), line.get("predicted") or {}
    if measured is None and not line.get("simulated"):
        return None
    if measured is not None:
        step_s = float(measured["step_s"])
        device_s = float(measured.get("device_s", step_s))
        waiting_s = float(measured.get("device_waiting_s", 0.0))
        cpu_s = sum(measured.get("attention_s") or ())
    else:
        step_s = device_s = float(predicted["step_s"])
        waiting_s = float(predicted.get("exposed_cpu_s", 0.0))
        cpu_s = sum(predicted["cpu_attention_s"])
    return StepRecord(
        start_s=float(line["start_s"]),
        step_s=step_s,
        device_s=min(device_s, step_s),
        waiting_s=min(waiting_s, device_s, step_s),
        cpu_s=cpu_s,
        mode=str(line["mode"]),
        has_prefill=any(s["gprf"] or s["cprf"] for s in line["sub_batches"]),
        device_blocks=int(line["device_blocks"]),
        host_blocks=int(line["host_blocks"]),
        simulated=measured is None,
    )


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return what files are sorted by: numbers in their names count as numbers."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _points(content: Any) -> list[dict[str, Any]]:
    """Return a file's points: itself, or those that were put together under `results`."""
    listed = content.get("results") if isinstance(content, dict) else None
    candidates = listed if isinstance(listed, list) else [content]
    return [
        point
        for point in candidates
        if isinstance(point, dict) and all(key in point for key in _NEEDED)
    ]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"result file {path} cannot be read: {error}") from error


def _with_label(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a result with a label; vLLM leaves it empty where none was given."""
    label = content["label"] or content.get("backend") or path.stem
    return {**content, "label": str(label)}
