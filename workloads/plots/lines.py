"""Figures with a line a system: latency against request rate, throughput against output length."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from engine.errors import ConfigError
from workloads.bench.summary import (
    Load,
    Spread,
    baseline_of,
    gain_over,
    group_repeats,
    spread,
)
from workloads.plots.metric import axis_label, check_metric
from workloads.plots.style import color_of, mark_simulated, marker_of, new_figure

Results = Sequence[Mapping[str, Any]]
Groups = Mapping[Load, Results]


def load_latency(results: Results, metric: str, title: str | None = None) -> Figure:
    """Draw latency against the request rate (the NEO paper, figure 6c).

    Args:
        results: Of several rates; those of all requests at once are left out.
        metric: Key of the latency, such as `p99_ttft_ms`.
        title: Over the figure.

    Raises:
        ConfigError: No result has the metric, or none has a finite rate.
    """
    finite = [r for r in results if math.isfinite(float(r["request_rate"]))]
    if not finite:
        raise ConfigError("load-latency needs results at finite request rates: --request-rate")
    check_metric(finite, metric)
    groups = group_repeats(finite)
    figure, axes = new_figure()
    _draw(axes, groups, lambda load: load.request_rate, lambda load: spread(groups[load], metric))
    axes.set_xlabel("request rate, requests/s")
    axes.set_ylabel(axis_label(metric))
    axes.set_yscale("log")
    for place in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        place(LogFormatter())  # 20 rather than 2 x 10^1
    axes.set_xlim(left=0)
    return _finish(figure, axes, finite, title)


def relative_throughput(results: Results, baseline: str, title: str | None = None) -> Figure:
    """Draw throughput over that of a baseline against the output length (figure 10a).

    Args:
        results: Of several output lengths, with the baseline's among them.
        baseline: The system that is 1; on each machine its own.
        title: Over the figure.

    Raises:
        ConfigError: Nothing can be compared with the baseline.
    """
    groups = group_repeats(results)
    labels = {load.label for load in groups}
    if not any(label.partition("@")[0] == baseline for label in labels):
        raise ConfigError(
            f"no result is of the baseline {baseline}; there are {', '.join(sorted(labels))}"
        )

    def gain(load: Load) -> Spread | None:
        own = baseline_of(load.label, labels, baseline)
        return None if own is None else gain_over(groups, load, own)

    others = {k: v for k, v in groups.items() if k.label.partition("@")[0] != baseline}
    if not any(gain(load) for load in others):
        raise ConfigError(f"no result can be compared with {baseline} at the same load")
    figure, axes = new_figure()
    axes.axhline(1.0, color="0.3", linestyle="--", linewidth=1, label=baseline)
    _draw(axes, others, lambda load: float(load.output_len), gain)
    axes.set_xlabel("output length, tokens")
    axes.set_ylabel(f"throughput relative to {baseline}")
    axes.set_ylim(bottom=min(0.9, axes.get_ylim()[0]))
    return _finish(figure, axes, results, title)


def _draw(
    axes: Axes,
    groups: Groups,
    x_of: Callable[[Load], float],
    y_of: Callable[[Load], Spread | None],
) -> None:
    """Draw a line a label: the median of the repeats, with a bar over their range."""
    labels = list(dict.fromkeys(load.label for load in groups))
    for index, label in enumerate(labels):
        found = [(x_of(load), y_of(load)) for load in groups if load.label == label]
        points = sorted(((x, y) for x, y in found if y is not None), key=lambda point: point[0])
        if not points:
            continue
        axes.errorbar(
            [x for x, _ in points],
            [y.median for _, y in points],
            yerr=[
                [y.median - y.low for _, y in points],
                [y.high - y.median for _, y in points],
            ],
            label=label,
            color=color_of(index),
            marker=marker_of(index),
            markersize=5,
            linewidth=1.6,
            capsize=3,
        )


def _finish(figure: Figure, axes: Axes, results: Results, title: str | None) -> Figure:
    simulated = [bool(result.get("simulated")) for result in results]
    mark_simulated(axes, some=any(simulated), every=all(simulated))
    if title:
        axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure
