"""Compiling a model's GPU kernels ahead of time, so that nothing compiles at serving time."""

from engine.backends import AttentionShape, make_backend, resolve_device
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.runner import resolve_dtype


def precompile_gpu_kernels(config: EngineConfig) -> int:
    """Compile every Triton kernel that serving a model launches, into Triton's cache.

    Args:
        config: Its model, dtype, block size and device count; weights are not read.

    Returns:
        How many kernel variants the model needs.

    Raises:
        ConfigError: There is no CUDA GPU.
        CheckpointError: The model cannot be opened.
    """
    device = resolve_device(config.device)
    if device.type != "cuda":
        raise ConfigError("GPU kernels are compiled where there is a CUDA GPU; torch sees none")
    checkpoint = open_checkpoint(config.model, load_format="dummy", revision=config.revision)
    model = ModelConfig.from_hf(checkpoint.config)
    shape = AttentionShape(
        num_layers=model.num_layers,
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.block_size,
        dtype=resolve_dtype(config.dtype, model.dtype),
    )
    return make_backend(device, None).prepare(model, shape)
