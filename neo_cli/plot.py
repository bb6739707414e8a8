"""`neo plot`: figures from result files and step logs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("load-latency", "throughput", "timeline", "kv")


def plot(
    kind: Annotated[str, typer.Argument(help="load-latency, throughput, timeline or kv.")],
    paths: Annotated[
        list[Path],
        typer.Argument(help="Result files or folders of them; step logs for timeline and kv."),
    ],
    out: Annotated[
        list[Path],
        typer.Option("--out", "-o", help="File to write: .svg, .png or .pdf; repeatable."),
    ],
    metric: Annotated[
        str | None,
        typer.Option(help="Latency of load-latency, such as p99_ttft_ms; per token if left out."),
    ] = None,
    baseline: Annotated[str, typer.Option(help="The system that is 1 in throughput.")] = "gpu-only",
    title: Annotated[str | None, typer.Option(help="Over the figure.")] = None,
    first_step: Annotated[int, typer.Option(help="Where timeline begins.", min=0)] = 0,
    num_steps: Annotated[int, typer.Option(help="Steps that timeline shows.", min=1)] = 20,
) -> int:
    """Draw a figure.

    Lines are medians of repeats, bars their range. Simulated data is marked across the figure.
    """
    if kind not in KINDS:
        raise typer.BadParameter(f"kind must be one of {', '.join(KINDS)}, got {kind}")
    try:
        from workloads.plots.style import save
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"neo plot needs the package {error.name}: pip install 'neo-llm[bench]'"
        ) from error
    figure = _draw(kind, paths, metric, baseline, title, first_step, num_steps)
    save(figure, out)
    for path in out:
        print(f"written to {path}")
    return 0


def _draw(
    kind: str,
    paths: list[Path],
    metric: str | None,
    baseline: str,
    title: str | None,
    first_step: int,
    num_steps: int,
) -> "Figure":
    from workloads.plots.lines import load_latency, relative_throughput
    from workloads.plots.metric import DEFAULT_LATENCY
    from workloads.plots.reading import read_results, read_steps
    from workloads.plots.step_figures import kv_use, timeline

    if kind == "load-latency":
        return load_latency(read_results(paths), metric or DEFAULT_LATENCY, title)
    if metric is not None:
        raise typer.BadParameter("--metric belongs to load-latency")
    if kind == "throughput":
        return relative_throughput(read_results(paths), baseline, title)
    if kind == "kv":
        logs = {path.stem.removesuffix(".steps"): read_steps(path) for path in paths}
        return kv_use(logs, title)
    if len(paths) != 1:
        raise typer.BadParameter(f"timeline shows one step log, got {len(paths)}")
    return timeline(read_steps(paths[0]), first_step, num_steps, title)
