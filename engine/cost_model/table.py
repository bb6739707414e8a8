"""Step times from measured points, kept as a small JSON file.

Each part is a one-dimensional table in the quantity that drives it, straight lines between points.
The last line goes on beyond them, from the last point that is at most half as far: two neighbours
say little if the clock was noisy. The profiler measures the points; nothing is measured here.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from engine.cost_model.base import ROTATING_HANDOVER_SHARE
from engine.errors import CheckpointError, ConfigError

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModelKey:
    """What a set of tables is valid for; two machines or models never share one.

    Args:
        gpu: Name of the GPU.
        cpu: Model name of the processor.
        num_threads: Attention threads.
        model_shape: Layers, widths, heads, as text.
        dtype: Of weights and KV.
        tensor_parallel_size: GPUs that share the model.
    """

    gpu: str
    cpu: str
    num_threads: int
    model_shape: str
    dtype: str
    tensor_parallel_size: int = 1


class Table:
    """A piecewise linear function through measured points, never below 0.

    Args:
        points: Pairs of quantity and seconds, the quantity rising.

    Raises:
        ConfigError: There is no point, the order is wrong, or a number is negative or not finite.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        self.points = tuple((float(x), float(y)) for x, y in points)
        self._xs = [x for x, _ in self.points]
        half = bisect_right(self._xs, self._xs[-1] / 2) if self._xs else 0
        self._before_end = min(max(half - 1, 0), max(len(self._xs) - 2, 0))
        if not self.points:
            raise ConfigError("a cost table needs at least one point, got none")
        if any(a >= b for a, b in zip(self._xs, self._xs[1:], strict=False)):
            raise ConfigError(f"a cost table's quantities must rise, got {self._xs}")
        if not all(math.isfinite(v) and v >= 0 for point in self.points for v in point):
            raise ConfigError(f"a cost table's numbers must be finite and at least 0: {points}")

    def __call__(self, x: float) -> float:
        """Return the seconds at `x`."""
        if len(self.points) == 1:
            return self.points[0][1]
        right = min(max(bisect_right(self._xs, x), 1), len(self.points) - 1)
        left = self._before_end if x > self._xs[-1] else right - 1
        (x0, y0), (x1, y1) = self.points[left], self.points[right]
        return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTables:
    """Measured points of every part; one layer's where a part is one layer's.

    Args:
        linear: Seconds by rows.
        prefill_attention: Seconds by visible (query, key) pairs.
        gpu_attention: Seconds by tokens, of many requests together.
        cpu_attention: Seconds by tokens, of many requests together.
        swap: Seconds by tokens, all layers.
        fixed_step: Seconds by sampled rows.
        gpu_attention_row_s: What each further request adds on the device.
        cpu_attention_row_s: What each further request adds on the host.
        handover_s: The device's own time for a hand-over to the host and back.
        launch_s: The host's time to launch a layer of a sub-batch.
        handover_launch_s: What a hand-over adds to that.
    """

    linear: Table
    prefill_attention: Table
    gpu_attention: Table
    cpu_attention: Table
    swap: Table
    fixed_step: Table
    gpu_attention_row_s: float = 0.0
    cpu_attention_row_s: float = 0.0
    handover_s: float = 0.0
    launch_s: float = 0.0
    handover_launch_s: float = 0.0

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be finite and at least 0, got {value}")


_NUMBERS = (
    "gpu_attention_row_s",
    "cpu_attention_row_s",
    "handover_s",
    "launch_s",
    "handover_launch_s",
)
_TABLES = tuple(f.name for f in fields(StepTables) if f.name not in _NUMBERS)


class TableCostModel:
    """A `CostModel` that looks up what was measured.

    Args:
        key: What the tables are valid for.
        num_layers: Layers of the model.
        tables: The points.

    Raises:
        ConfigError: The number of layers is below 1.
    """

    def __init__(self, key: CostModelKey, num_layers: int, tables: StepTables) -> None:
        if num_layers < 1:
            raise ConfigError(f"a cost model's num_layers must be at least 1, got {num_layers}")
        self.key = key
        self.tables = tables
        self.most_direct_share = 0.0
        self._num_layers = num_layers

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self._num_layers

    def linear_s(self, num_rows: int, *, rotating: bool = False) -> float:
        """Look up rows."""
        return self.tables.linear(num_rows)

    def prefill_attention_s(self, query_len: int, context_len: int) -> float:
        """Look up visible pairs."""
        return self.tables.prefill_attention(num_visible_pairs(query_len, context_len))

    def gpu_attention_s(self, num_seqs: int, total_tokens: int) -> float:
        """Look up tokens and add a little per request."""
        if num_seqs == 0:
            return 0.0
        return self.tables.gpu_attention(total_tokens) + num_seqs * self.tables.gpu_attention_row_s

    def cpu_attention_s(self, num_rows: int, total_tokens: int, *, rotating: bool = False) -> float:
        """Look up tokens and add a little per row."""
        if num_rows == 0:
            return 0.0
        return self.tables.cpu_attention(total_tokens) + num_rows * self.tables.cpu_attention_row_s

    def handover_s(self, *, rotating: bool = False) -> float:
        """As measured where the answer is waited for, or a share of it."""
        share = ROTATING_HANDOVER_SHARE if rotating else 1.0
        return share * self.tables.handover_s

    def launch_s(self, num_handovers: int) -> float:
        """As measured."""
        return self.tables.launch_s + num_handovers * self.tables.handover_launch_s

    def swap_s(self, num_tokens: int) -> float:
        """Look up tokens."""
        return self.tables.swap(num_tokens) if num_tokens else 0.0

    def fixed_step_s(self, num_sampled: int) -> float:
        """Look up sampled rows."""
        return self.tables.fixed_step(num_sampled)

    def to_json(self) -> str:
        """Return the file's text."""
        tables: dict[str, Any] = {name: getattr(self.tables, name).points for name in _TABLES}
        tables |= {name: getattr(self.tables, name) for name in _NUMBERS}
        return json.dumps(
            {
                "version": FORMAT_VERSION,
                "key": asdict(self.key),
                "num_layers": self.num_layers,
                "tables": tables,
            },
            indent=1,
        )

    @classmethod
    def from_json(
        cls, text: str, *, source: str, key: CostModelKey | None = None
    ) -> "TableCostModel":
        """Read a file's text.

        Args:
            text: What `to_json` wrote.
            source: Where it comes from, for error messages.
            key: What the tables must be valid for; None takes any.

        Raises:
            CheckpointError: The text is not such a file, or of another version.
            ConfigError: The tables were measured for something else.
        """
        try:
            found = cls._parse(json.loads(text), source)
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"cost table {source} is broken ({type(error).__name__}: {error}); "
                "delete it and profile again"
            ) from error
        if key is not None and found.key != key:
            differing = [
                f"{f.name} {getattr(found.key, f.name)!r} instead of {getattr(key, f.name)!r}"
                for f in fields(CostModelKey)
                if getattr(found.key, f.name) != getattr(key, f.name)
            ]
            raise ConfigError(f"cost table {source} was measured for {', '.join(differing)}")
        return found

    @classmethod
    def _parse(cls, content: Mapping[str, Any], source: str) -> "TableCostModel":
        if content["version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"cost table {source} has version {content['version']}, expected "
                f"{FORMAT_VERSION}; delete it and profile again"
            )
        tables: dict[str, Any] = {name: Table(content["tables"][name]) for name in _TABLES}
        tables |= {name: float(content["tables"][name]) for name in _NUMBERS}
        key = CostModelKey(**content["key"])
        return cls(key, int(content["num_layers"]), StepTables(**tables))


def num_visible_pairs(query_len: int, context_len: int) -> float:
    """Return how many (query, key) pairs causal attention of a chunk computes."""
    return query_len * (context_len - (query_len - 1) / 2)
