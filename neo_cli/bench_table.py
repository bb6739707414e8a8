"""What `neo bench` shows: a progress bar and a table that grows on stderr, the table on stdout."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from workloads.bench.point import rate_text
from workloads.bench.summary import (
    Load,
    Spread,
    baseline_of,
    gain_over,
    group_repeats,
    spread,
)

if TYPE_CHECKING:
    from workloads.bench.survey import MachineReport

_PIPE_WIDTH = 170
"""Columns where stdout is no terminal."""
_COLUMNS = (
    ("req/s", "request_throughput"),
    ("tok/s", "output_throughput"),
    ("TTFT ms", "mean_ttft_ms"),
    ("TPOT ms", "mean_tpot_ms"),
    ("ms/tok", "mean_per_token_latency_ms"),
)


class BenchDisplay:
    """Shows a sweep while it runs.

    Args:
        title: Over the table.
        baseline: Label of the system that others are compared with.
    """

    def __init__(self, title: str, baseline: str) -> None:
        self._title = title
        self._baseline = baseline
        self._console = Console(stderr=True)
        self._results: list[Mapping[str, Any]] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("requests"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._live: Live | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator["BenchDisplay"]:
        """Show it until the end of the block; nothing moves where stderr is no terminal."""
        if not self._console.is_terminal:
            yield self
            return
        with Live(self._view(), console=self._console, transient=True) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    def on_progress(self, line: str) -> None:
        """Show what is going on."""
        if self._live is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._restart(line, None)

    def on_point(self, name: str, num_requests: int) -> Callable[[int], None]:
        """Show that a point begins; return what to call with the number of requests done."""
        if self._live is None:
            return lambda finished: None
        task = self._restart(name, num_requests)
        return lambda finished: self._progress.update(task, completed=finished)

    def add(self, result: Mapping[str, Any], was_kept: bool) -> None:
        """Show a point's result."""
        self._results.append(result)
        if self._live is not None:
            self._live.update(self._view())
            return
        kept = " (kept from before)" if was_kept else ""
        rate = rate_text(float(result["request_rate"]))
        print(
            f"{result['label']} at {rate} requests/s: {result['request_throughput']:.3f} "
            f"requests/s, {result['completed']} completed, {result['failed']} failed{kept}",
            file=sys.stderr,
            flush=True,
        )

    def print_results(self) -> None:
        """Print the table on stdout, and on stderr what a reader has to know."""
        if not self._results:
            return
        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(self._table())
        seen = set()
        for result in self._results:
            notes = [f"{m} ({n} requests)" for m, n in result["error_counts"].items()]
            for note in [*result["warnings"], *notes]:
                line = f"{result['label']}: {note}"
                if line not in seen:
                    seen.add(line)
                    print(line, file=sys.stderr)

    def _restart(self, description: str, total: int | None) -> Any:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        return self._progress.add_task(description, total=total)

    def _view(self) -> Group:
        return Group(self._table(), self._progress) if self._results else Group(self._progress)

    def _table(self) -> Table:
        groups = group_repeats(self._results)
        labels = {load.label for load in groups}
        has_lens = any(load.output_len for load in groups)
        table = Table(title=self._title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
        table.add_column("system", no_wrap=True)
        for name in ["rate", *(["out"] if has_lens else []), *(name for name, *_ in _COLUMNS)]:
            table.add_column(name, justify="right", overflow="fold")
        table.add_column(f"/ {self._baseline}", justify="right")
        table.add_column("failed", justify="right", overflow="fold")
        for load, results in groups.items():
            cells = [load.label, rate_text(load.request_rate)]
            cells += [str(load.output_len)] if has_lens else []
            cells += [_cell(spread(results, metric)) for _, metric in _COLUMNS]
            cells.append(self._gain(groups, load, labels))
            cells.append(str(sum(result["failed"] for result in results)))
            table.add_row(*cells)
        return table

    def _gain(
        self,
        groups: Mapping[Load, Sequence[Mapping[str, Any]]],
        load: Load,
        labels: set[str],
    ) -> str:
        baseline = baseline_of(load.label, labels, self._baseline)
        if baseline is None or baseline == load.label:
            return ""
        ratio = gain_over(groups, load, baseline)
        return "" if ratio is None else _cell(ratio)


def print_survey(reports: "Sequence[MachineReport]", title: str) -> None:
    """Print what was found for each machine."""
    table = Table(title=title, title_justify="left", caption="simulated", caption_justify="left")
    for name, justify in (
        ("machine", "left"),
        ("KV tokens, GPU", "right"),
        ("host", "right"),
        ("GPU only, requests/s", "right"),
        ("NEO", "right"),
        ("gain", "right"),
        ("best mode", "left"),
        ("limited by", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for report in reports:
        if report.problem is not None:
            table.add_row(report.machine, *[""] * 6, report.problem)
            continue
        gain = "only with the host" if report.gain is None else f"{report.gain:.2f} ×"
        table.add_row(
            report.machine,
            f"{report.device_kv_tokens:,}",
            f"{report.host_kv_tokens:,}",
            f"{report.gpu_only:.2f}",
            f"{report.neo:.2f}",
            gain,
            report.best_mode,
            report.limited_by,
        )
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def _cell(value: Spread | None) -> str:
    if value is None:
        return "–"
    if value.low == value.high:
        return _number(value.median)
    return f"{_number(value.median)} ({_number(value.low)}–{_number(value.high)})"


def _number(value: float) -> str:
    """Return four significant digits, or all those before the point."""
    digits = 3 if abs(value) < 1 else max(0, 3 - int(math.log10(abs(value))))
    return f"{value:.{digits}f}"
