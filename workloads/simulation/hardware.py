"""Machines to simulate: what each reaches, with a source for every figure.

`workloads/hardware` holds one JSON file a machine; a file of one's own has the same keys. Figures
are those of `engine.cost_model.HardwareSpec`, of which any may be given. A file that `neo profile
--json` wrote is a machine, too: its times were measured, so nothing is left to estimate.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.cost_model import (
    AnalyticCostModel,
    CostModel,
    HardwareSpec,
    ModelSpec,
    TableCostModel,
    balanced_direct_share,
)
from engine.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "hardware"
_KEYS = ("name", "gpu", "host", "num_cores", "gpu_memory_bytes", "host_memory_bytes", "figures")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine with one GPU.

    Args:
        name: For tables and plots.
        gpu: The GPU.
        host: The processor.
        num_cores: Of the host.
        gpu_memory_bytes: As the driver reports it.
        host_memory_bytes: In all.
        spec: What the machine reaches; None if it was measured.
        tables: Measured times; None if they are to be computed from `spec`.
        sources: Where each figure is from.
    """

    name: str
    gpu: str
    host: str
    num_cores: int
    gpu_memory_bytes: int | None
    host_memory_bytes: int | None
    spec: HardwareSpec | None
    tables: TableCostModel | None
    sources: Mapping[str, str]

    def cost_model(self, model: ModelSpec, *, pcie_attention: bool = False) -> CostModel:
        """Return the times of a model's steps on this machine.

        Args:
            model: Its shape.
            pcie_attention: Whether the GPU attends to some of the rotating rows itself.

        Raises:
            ConfigError: The machine's times were measured with another model.
        """
        found: AnalyticCostModel | TableCostModel
        if self.tables is not None:
            num_layers = self.tables.num_layers
            if num_layers != model.num_layers:
                raise ConfigError(
                    f"the tables of {self.name} are those of a model of {num_layers} layers, this "
                    f"one has {model.num_layers}"
                )
            found = TableCostModel(self.tables.key, num_layers, self.tables.tables)
        else:
            assert self.spec is not None
            found = AnalyticCostModel(self.spec, model)
        if pcie_attention:
            found.most_direct_share = balanced_direct_share(found)
        return found


def hardware_names() -> list[str]:
    """Return the machines that come with NEO."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_hardware(name: str) -> Hardware:
    """Return a machine.

    Args:
        name: One of `hardware_names`, or the path of a JSON file.

    Raises:
        ConfigError: There is no such machine or file, or its content is unusable.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        path = Path(name).expanduser()
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"hardware {name!r} is neither a file nor one of {', '.join(hardware_names())}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"hardware file {name} cannot be read: {error}") from error
    if isinstance(content, dict) and "tables" in content:
        return _from_tables(json.dumps(content), name)
    return _from_figures(content, name)


def _from_figures(content: Any, source: str) -> Hardware:
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise ConfigError(f"hardware file {source} lacks {', '.join(missing)}")
    try:
        return Hardware(
            name=str(content["name"]),
            gpu=str(content["gpu"]),
            host=str(content["host"]),
            num_cores=int(content["num_cores"]),
            gpu_memory_bytes=int(content["gpu_memory_bytes"]),
            host_memory_bytes=int(content["host_memory_bytes"]),
            spec=HardwareSpec(**{k: float(v) for k, v in content["figures"].items()}),
            tables=None,
            sources=dict(content.get("sources", {})),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"hardware file {source} has an unusable value: {error}") from error


def _from_tables(text: str, source: str) -> Hardware:
    tables = TableCostModel.from_json(text, source=source)
    return Hardware(
        name=f"{tables.key.gpu} (measured tables)",
        gpu=tables.key.gpu,
        host=tables.key.cpu,
        num_cores=tables.key.num_threads + 1,
        gpu_memory_bytes=None,
        host_memory_bytes=None,
        spec=None,
        tables=tables,
        sources={"tables": "measured: the engine's cost tables"},
    )
