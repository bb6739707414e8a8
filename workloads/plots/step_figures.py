"""Figures from step logs: what GPU and CPU do when, and how full their KV pools are."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from engine.errors import ConfigError
from workloads.plots.reading import StepRecord
from workloads.plots.style import color_of, mark_simulated, new_figure

_LANES = {"CPU attention": 0, "GPU": 1}
_HEIGHT = 0.7
_CPU_COLOR = 4
_WAITING_COLOR = "#c9c9c9"


def timeline(
    steps: Sequence[StepRecord], first: int, count: int, title: str | None = None
) -> Figure:
    """Draw lanes of GPU and CPU over time, a bar a step.

    What happened layer by layer is drawn as a whole: the CPU's attention from the start of its
    step, the GPU's waiting for it at the end.

    Args:
        steps: Of one log.
        first: The first step to show.
        count: How many to show.
        title: Over the figure.

    Raises:
        ConfigError: There are no such steps.
    """
    shown = steps[first : first + count]
    if not shown:
        raise ConfigError(f"the log has {len(steps)} steps, none from {first} on")
    origin = shown[0].start_s
    figure, axes = new_figure(height_inches=2.4)
    modes = sorted({step.mode for step in steps})
    patches = []
    for index, mode in enumerate(modes):
        for has_prefill in (False, True):
            spans = [
                ((step.start_s - origin) * 1e3, step.busy_s * 1e3)
                for step in shown
                if step.mode == mode and step.has_prefill is has_prefill
            ]
            if not spans:
                continue
            label = f"{mode}, with prompts" if has_prefill else mode
            hatch = "///" if has_prefill else ""
            patch = Patch(
                facecolor=color_of(index),
                edgecolor="white",
                linewidth=0.4,
                hatch=hatch,
                label=label,
            )
            bars = axes.broken_barh(spans, (_LANES["GPU"] - _HEIGHT / 2, _HEIGHT), label=label)
            bars.set(facecolor=color_of(index), edgecolor="white", linewidth=0.4, hatch=hatch)
            patches.append(patch)
    waiting = [
        ((s.start_s - origin + s.busy_s) * 1e3, s.waiting_s * 1e3) for s in shown if s.waiting_s > 0
    ]
    if waiting:
        label = "GPU waits for the CPU"
        bottom = _LANES["GPU"] - _HEIGHT / 2
        axes.broken_barh(waiting, (bottom, _HEIGHT), facecolor=_WAITING_COLOR, label=label)
        patches.append(Patch(facecolor=_WAITING_COLOR, label=label))
    cpu = [((s.start_s - origin) * 1e3, s.cpu_s * 1e3) for s in shown if s.cpu_s > 0]
    color = color_of(_CPU_COLOR)
    axes.broken_barh(
        cpu,
        (_LANES["CPU attention"] - _HEIGHT / 2, _HEIGHT),
        facecolor=color,
        label="CPU attention",
    )
    axes.set_yticks(list(_LANES.values()), list(_LANES))
    axes.set_ylim(-0.6, 1.6)
    end = max(step.start_s + max(step.step_s, step.cpu_s) for step in shown)
    axes.set_xlim(0, (end - origin) * 1e3)
    axes.set_xlabel(f"time from step {first} on, ms")
    mark_simulated(
        axes, some=any(s.simulated for s in shown), every=all(s.simulated for s in shown)
    )
    if title:
        axes.set_title(title, loc="left", fontsize=10)
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def kv_use(logs: Mapping[str, Sequence[StepRecord]], title: str | None = None) -> Figure:
    """Draw used KV blocks over time: device solid, host dashed, a colour a log.

    Args:
        logs: Steps by name.
        title: Over the figure.
    """
    figure, axes = new_figure()
    for index, (name, steps) in enumerate(logs.items()):
        times = [step.start_s - steps[0].start_s for step in steps]
        for label, values, linestyle in (
            ("device", [step.device_blocks for step in steps], "-"),
            ("host", [step.host_blocks for step in steps], "--"),
        ):
            if not any(values):
                continue
            axes.step(
                times,
                values,
                where="post",
                color=color_of(index),
                linestyle=linestyle,
                linewidth=1.4,
                label=f"{name}, {label}",
            )
    axes.set_xlabel("time, s")
    axes.set_ylabel("KV blocks in use")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    every = [step.simulated for steps in logs.values() for step in steps]
    mark_simulated(axes, some=any(every), every=all(every))
    if title:
        axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure
