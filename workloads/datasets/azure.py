"""The public Azure LLM inference traces: arrival times and lengths, one CSV line a request.

Source: https://github.com/Azure/AzurePublicDataset, `AzureLLMInferenceTrace_code` and `_conv`.
"""

import csv
import io
from datetime import datetime
from pathlib import Path

from workloads.datasets.sample import Sample, broken, positive_int, read_text

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MICROSECOND_DIGITS = 6


def read_azure_trace(path: Path) -> list[Sample]:
    """Read a trace.

    Raises:
        RequestError: A column is missing or a line is broken.
    """
    rows = csv.DictReader(io.StringIO(read_text(path)))
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise broken(
            path, f"expected the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}"
        )
    times, lengths = [], []
    for number, row in enumerate(rows, start=2):
        where = f"line {number}"
        times.append(_parse_time(row["TIMESTAMP"], path, where))
        context, generated = (positive_int(row[name], path, where) for name in COLUMNS[1:])
        lengths.append((context, generated))
    if not times:
        raise broken(path, "holds no requests")
    first = min(times)
    samples = [
        Sample(*pair, arrival_s=(time - first).total_seconds())
        for time, pair in zip(times, lengths, strict=True)
    ]
    return sorted(samples, key=lambda sample: sample.arrival_s or 0.0)


def _parse_time(text: str | None, path: Path, where: str) -> datetime:
    """Read a time stamp; the traces have seven digits after the point, Python reads six."""
    value = (text or "").strip().removesuffix("Z").removesuffix("+00:00")
    head, _, fraction = value.partition(".")
    try:
        return datetime.fromisoformat(
            f"{head}.{(fraction or '0')[:_MICROSECOND_DIGITS]:0<6}" if fraction else head
        )
    except ValueError as error:
        raise broken(path, f"{where}: expected a time stamp, got {text!r}") from error
