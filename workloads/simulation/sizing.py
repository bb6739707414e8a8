"""How large a model is, and how much KV a machine has room for beside it."""

from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint import open_checkpoint
from engine.cost_model import ModelSpec
from engine.errors import CapacityError, ConfigError
from engine.model_config import ModelConfig
from engine.scheduling.scheduler_config import SchedulerConfig
from workloads.model_shapes import find_shape
from workloads.simulation.hardware import Hardware

ELEMENT_BYTES = 2
"""Weights and KV are bfloat16 or float16."""
DRIVER_BYTES = 600 * 2**20
"""What the CUDA context and libraries take."""
HOST_SHARE = 0.75
"""Of the host's memory, what its KV pool may take."""


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """A model's name and shape."""

    name: str
    config: ModelConfig

    @classmethod
    def open(cls, model: str) -> "SimulatedModel":
        """Read a model's configuration; its weights are not needed.

        Args:
            model: A packaged shape or the hub id it stands for, a folder, a .gguf file or a hub id.

        Raises:
            CheckpointError: There is no such model, or it is not supported.
        """
        shape = find_shape(model)
        checkpoint = open_checkpoint(shape or model, load_format="dummy")
        name = Path(model).name if Path(model).exists() else model  # the same wherever it lies
        return cls(name, ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config))

    @property
    def spec(self) -> ModelSpec:
        """What the cost model needs."""
        config = self.config
        return ModelSpec(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            element_bytes=ELEMENT_BYTES,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return self.config.kv_elements_per_token * ELEMENT_BYTES

    def step_bytes(self, limits: SchedulerConfig) -> int:
        """Return about what a step's activations take at most."""
        config = self.config
        per_token = (6 * config.hidden_size + 3 * config.intermediate_size) * ELEMENT_BYTES
        logits = 3 * limits.max_num_seqs * config.vocab_size * 4
        return limits.max_num_batched_tokens * per_token + logits


def device_kv_blocks(
    hardware: Hardware,
    model: SimulatedModel,
    limits: SchedulerConfig,
    *,
    block_size: int,
    gpu_memory_utilization: float,
) -> int:
    """Return the KV blocks for which a GPU has room.

    Raises:
        CapacityError: Not even one request's worth fits beside the weights.
        ConfigError: The machine's memory is not known.
    """
    if hardware.gpu_memory_bytes is None:
        raise ConfigError(f"{hardware.name} does not say its GPU's memory: --device-kv-blocks")
    weights = model.config.num_parameters * ELEMENT_BYTES
    room = int(hardware.gpu_memory_bytes * gpu_memory_utilization)
    room -= weights + model.step_bytes(limits) + DRIVER_BYTES
    blocks = room // (model.kv_bytes_per_token * block_size)
    if blocks < 1:
        raise CapacityError(
            f"{model.name} does not fit {hardware.gpu}: {weights / 2**30:.1f} GiB of weights in "
            f"{hardware.gpu_memory_bytes / 2**30:.1f} GiB leave no room for KV"
        )
    return blocks


def host_kv_blocks(
    hardware: Hardware, model: SimulatedModel, *, block_size: int, host_kv_gb: float | None
) -> int:
    """Return the KV blocks of the host pool: as asked for, or a share of the host's memory.

    Raises:
        ConfigError: The machine's memory is not known and nothing was asked for.
    """
    num_bytes = None if host_kv_gb is None else host_kv_gb * 2**30
    if num_bytes is None:
        if hardware.host_memory_bytes is None:
            raise ConfigError(f"{hardware.name} does not say its host's memory: --host-kv-gb")
        num_bytes = hardware.host_memory_bytes * HOST_SHARE
    return max(1, int(num_bytes) // (model.kv_bytes_per_token * block_size))
