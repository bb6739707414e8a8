"""Runs a sweep: repeats outermost, systems in turn, so that a slow spell hits all of them."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, NeoError
from workloads.arrivals import arrival_times
from workloads.bench.config import BenchConfig
from workloads.bench.point import Point, file_stem, points_of, rate_text
from workloads.bench.system import Job, OnProgress, Session, System
from workloads.datasets import Workload, load_workload
from workloads.datasets.load import check_trace_arrivals
from workloads.metrics import compute_metrics
from workloads.records import RunRecord
from workloads.result_file import circumstances, write_json

WARMUP_SEED = 1_000_003
"""Far from the seeds of repeats, so that warm-up requests are not those that are measured."""


class ServerLostError(NeoError):
    """The server does not answer any more; what it had not answered counts as failed."""


@dataclass(frozen=True, slots=True)
class PointResult:
    """A point's result file, read or just written."""

    label: str
    point: Point
    figures: dict[str, Any]
    path: Path
    was_kept: bool


class Sweep:
    """Measures systems at the points of a configuration.

    Args:
        config: What to measure.
        systems: What to measure it on.
        on_progress: Told what is going on, one line at a time.
        on_point: Called when a point begins, with the number of its requests; what it returns is
            called with the number of requests that have ended.

    Raises:
        ConfigError: Several systems would have one label.
    """

    def __init__(
        self,
        config: BenchConfig,
        systems: Sequence[System],
        on_progress: OnProgress = lambda line: None,
        on_point: Callable[[str, int], Callable[[int], None]] = lambda name, count: (
            lambda finished: None
        ),
    ) -> None:
        if config.label is not None and len(systems) > 1:
            raise ConfigError(f"label names one system, and there are {len(systems)}")
        self._config = config
        self._systems = systems
        self._on_progress = on_progress
        self._on_point = on_point

    @property
    def num_points(self) -> int:
        """Measurements in all."""
        per_repeat = len(points_of(self._config, 0))
        return per_repeat * self._config.repeats * len(self._systems)

    def run(self) -> Iterator[PointResult]:
        """Yield every point's result as soon as it is there; finished ones are not run again.

        Raises:
            ServerLostError: A server went away; the point's result is written first.
            NeoError: A system cannot start, or the workload cannot be made.
        """
        for repeat in range(self._config.repeats):
            for system in self._systems:
                yield from self._run_system(system, repeat)

    def _run_system(self, system: System, repeat: int) -> Iterator[PointResult]:
        points = points_of(self._config, repeat)
        missing = []
        for point in points:
            kept = self._find(system, point)
            if kept is None:
                missing.append(point)
            else:
                yield kept
        if not missing:
            return
        with system.session(self._on_progress) as session:
            self._warm_up(session, missing[0])
            for point in missing:
                yield self._measure(system, session, point)

    def _label(self, system: System) -> str:
        return self._config.label or system.label

    def _path(self, system: System, point: Point) -> Path:
        stem = file_stem(self._label(system), point, self._config, system.options)
        return self._config.result_dir / f"{stem}.json"

    def _find(self, system: System, point: Point) -> PointResult | None:
        path = self._path(system, point)
        if self._config.overwrite or not path.exists():
            return None
        try:
            figures = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"result file {path} cannot be read: {error}; delete it") from error
        if figures.get("server_lost"):
            return None
        return PointResult(self._label(system), point, figures, path, True)

    def _warm_up(self, session: Session, point: Point) -> None:
        """Send a few requests that are not counted, so that everything is compiled and cached."""
        count = self._config.num_warmups
        if count == 0 or session.maker is None:
            return
        self._on_progress(f"warming up with {count} requests")
        dataset = point.dataset(self._config)
        # Of the data set's own length, so that the shapes are those that will be measured.
        workload = load_workload(
            replace(dataset, num_prompts=count, seed=WARMUP_SEED + point.repeat), session.maker
        )
        requests = [
            replace(r, num_output_tokens=min(r.num_output_tokens, 16)) for r in workload.requests
        ]
        run = session.run(
            Job(requests=requests, arrivals=[0.0] * len(requests), name="warm-up"),
            lambda finished: None,
        )
        failed = [r for r in run.requests if not r.completed]
        if len(failed) == len(run.requests):
            raise NeoError(f"every warm-up request failed: {failed[0].error or 'no answer'}")

    def _measure(self, system: System, session: Session, point: Point) -> PointResult:
        config = self._config
        workload = load_workload(point.dataset(config), session.maker)
        if config.use_trace_arrivals:
            arrivals = check_trace_arrivals(workload.requests)
        else:
            arrivals = arrival_times(point.arrivals(config), len(workload.requests))
        path = self._path(system, point)
        name = f"{self._label(system)} at {rate_text(point.request_rate)} requests/s"
        if point.output_len is not None:
            name += f", {point.output_len} out"
        job = Job(
            requests=workload.requests,
            arrivals=arrivals,
            max_concurrency=config.max_concurrency,
            name=path.stem,
        )
        run = session.run(job, self._on_point(name, len(workload.requests)))
        content = self._content(system, session, point, workload, run)
        write_json(path, content)
        if content["server_lost"]:
            raise ServerLostError(
                f"{self._label(system)} stopped answering; {content['completed']} requests of "
                f"{content['num_prompts']} completed, see {path}; the same command goes on from "
                "here"
            )
        return PointResult(self._label(system), point, content, path, False)

    def _content(
        self,
        system: System,
        session: Session,
        point: Point,
        workload: Workload,
        run: RunRecord,
    ) -> dict[str, Any]:
        """Return a result file's content: `vllm bench serve`'s keys, and NEO's."""
        config = self._config
        arrivals = point.arrivals(config)
        burstiness = "inf" if math.isinf(arrivals.burstiness) else arrivals.burstiness
        rate = "inf" if math.isinf(point.request_rate) else point.request_rate
        options = {
            "dataset": asdict(point.dataset(config)),
            "arrivals": {**asdict(arrivals), "request_rate": rate, "burstiness": burstiness},
            "use_trace_arrivals": config.use_trace_arrivals,
            "num_warmups": config.num_warmups,
            "system": system.options,
        }
        return {
            **circumstances(options, simulated=system.is_simulated),
            **config.metadata,
            "label": self._label(system),
            "system": system.name,
            **session.facts,
            "workload": workload.source,
            "output_len": point.output_len,
            "repeat": point.repeat,
            "num_prompts": len(workload.requests),
            "request_rate": rate,
            "burstiness": burstiness,
            "max_concurrency": config.max_concurrency,
            **compute_metrics(run, config.metrics),
            **run.details,
            "server_lost": bool(run.details.get("server_lost", False)),
            "warnings": run.warnings,
        }
