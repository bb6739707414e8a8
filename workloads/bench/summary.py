"""Puts the repeats of points together, and systems beside their baseline."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RATE = "request_throughput"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Load:
    """What the repeats of a point have in common.

    `request_rate` is infinite for all at once; `output_len` 0 stands for the data set's own.
    """

    label: str
    output_len: int
    request_rate: float


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeats, and how far they lie apart."""

    median: float
    low: float
    high: float


def load_of_result(result: Mapping[str, Any]) -> Load:
    """Return where a result belongs."""
    return Load(
        label=str(result["label"]),
        output_len=int(result.get("output_len") or 0),
        request_rate=float(result["request_rate"]),
    )


def group_repeats(
    results: Iterable[Mapping[str, Any]],
) -> dict[Load, list[Mapping[str, Any]]]:
    """Return results by load, in the order in which each was first seen."""
    groups: dict[Load, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(load_of_result(result), []).append(result)
    return groups


def spread(results: Sequence[Mapping[str, Any]], metric: str) -> Spread | None:
    """Return median and range of a metric; None if no result has it."""
    values = [float(r[metric]) for r in results if r.get(metric) is not None]
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values))


def gain_over(
    groups: Mapping[Load, Sequence[Mapping[str, Any]]], load: Load, baseline_label: str
) -> Spread | None:
    """Return throughput over that of a baseline at the same load, repeat by repeat.

    A repeat is the same workload on both; so the ratio is taken before the median.
    """
    own = _by_repeat(groups.get(load, ()))
    base = _by_repeat(
        groups.get(
            Load(
                label=baseline_label,
                output_len=load.output_len,
                request_rate=load.request_rate,
            ),
            (),
        )
    )
    ratios = [own[r] / base[r] for r in own if base.get(r)]
    if not ratios:
        return None
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


def baseline_of(label: str, labels: Iterable[str], baseline: str) -> str | None:
    """Return which label is the baseline of another: that system on the same machine.

    Args:
        label: `system` or `system@machine`.
        labels: Those that there are.
        baseline: The baseline's system.
    """
    machine = label.partition("@")[2]
    wanted = f"{baseline}@{machine}" if machine else baseline
    return wanted if wanted in set(labels) else None


def _by_repeat(results: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    return {int(r.get("repeat", 0)): float(r[RATE]) for r in results}
