"""How many KV blocks fit: from free memory, from the options, and from what could be of use."""

from engine.backends import AttentionShape
from engine.config import EngineConfig
from engine.errors import CapacityError, ConfigError
from engine.host_memory import available_host_bytes
from engine.model_config import ModelConfig

DEFAULT_HOST_KV_BYTES = 4 * 2**30
MAX_HOST_SHARE = 0.5
"""Without an option, a CPU device never takes more than this share of the available memory."""


def wanted_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Return the context length before the pool's size is known.

    Raises:
        ConfigError: The model does not support it.
    """
    max_model_len = config.max_model_len or model.rope.max_positions
    model.check_max_model_len(max_model_len)
    return max_model_len


def num_cpu_device_blocks(config: EngineConfig, shape: AttentionShape, max_model_len: int) -> int:
    """Return the blocks of the device pool when the CPU plays the device.

    Raises:
        CapacityError: They do not fit into the memory that is available.
    """
    num_blocks = config.device_kv_blocks
    if num_blocks is None:
        num_bytes = min(DEFAULT_HOST_KV_BYTES, int(available_host_bytes() * MAX_HOST_SHARE))
        num_blocks = min(num_bytes // shape.block_bytes, _useful_blocks(config, max_model_len))
    _check_host_blocks(num_blocks, shape, "--device-kv-blocks")
    return num_blocks


def num_host_blocks(
    config: EngineConfig, shape: AttentionShape, max_model_len: int, device_type: str
) -> int:
    """Return the blocks of the host pool, 0 if requests are not to be offloaded.

    On a CPU device there is a host pool only if it is asked for: it is of no use beyond tests.

    Raises:
        CapacityError: They do not fit into the memory that is available.
    """
    if config.scheduler.mode == "gpu-only":
        return 0
    if config.host_kv_gb is not None:
        num_blocks = int(config.host_kv_gb * 2**30) // shape.block_bytes
        if num_blocks < 1:
            raise CapacityError(
                f"--host-kv-gb {config.host_kv_gb} is less than one KV block of "
                f"{shape.block_bytes / 2**20:.2f} MiB; raise it"
            )
    elif device_type == "cpu" and config.scheduler.mode == "auto":
        return 0
    else:
        num_bytes = min(DEFAULT_HOST_KV_BYTES, int(available_host_bytes() * MAX_HOST_SHARE))
        num_blocks = min(num_bytes // shape.block_bytes, _useful_blocks(config, max_model_len))
    _check_host_blocks(num_blocks, shape, "--host-kv-gb")
    return num_blocks


def _check_host_blocks(num_blocks: int, shape: AttentionShape, option: str) -> None:
    available, num_bytes = available_host_bytes(), num_blocks * shape.block_bytes
    if num_bytes > available or num_blocks < 1:
        raise CapacityError(
            f"a KV cache of {num_blocks} blocks needs {num_bytes / 2**30:.1f} GiB of host memory, "
            f"{available / 2**30:.1f} GiB are available; lower {option}"
        )


def num_gpu_blocks(
    config: EngineConfig,
    shape: AttentionShape,
    max_model_len: int,
    *,
    total_bytes: int,
    occupied_bytes: int,
) -> int:
    """Return the blocks of a pool in GPU memory.

    Args:
        config: The options.
        shape: The cache's.
        max_model_len: Longest request, in tokens.
        total_bytes: Memory of the GPU.
        occupied_bytes: What is taken at the peak of a worst-case step: weights, activations, other
            programs.

    Raises:
        CapacityError: There is no room for the blocks asked for, or for any.
    """
    budget = int(total_bytes * config.gpu_memory_utilization) - occupied_bytes
    fitting = max(0, budget) // shape.block_bytes
    wanted = config.device_kv_blocks
    if wanted is None:
        wanted = min(fitting, _useful_blocks(config, max_model_len))
    if wanted > fitting or wanted < 1:
        raise CapacityError(
            f"the GPU has room for {fitting} KV blocks, {max(wanted, 1)} are needed: "
            f"{occupied_bytes / 2**30:.1f} of {total_bytes / 2**30:.1f} GiB are taken at the peak "
            f"of a step and --gpu-memory-utilization is {config.gpu_memory_utilization}; raise it, "
            "or lower --device-kv-blocks, --max-num-batched-tokens or --max-num-seqs"
        )
    return wanted


def fit_max_model_len(config: EngineConfig, max_model_len: int, capacity_tokens: int) -> int:
    """Return the longest request that the pool can hold.

    Args:
        config: The options.
        max_model_len: Wanted, in tokens.
        capacity_tokens: What the pool holds.

    Raises:
        CapacityError: The user asked for more than that.
    """
    if config.max_model_len is not None and max_model_len > capacity_tokens:
        raise CapacityError(
            f"max_model_len {max_model_len} does not fit the KV cache of {capacity_tokens} tokens; "
            "lower --max-model-len, or raise --device-kv-blocks or --host-kv-gb"
        )
    if capacity_tokens < 2:
        raise ConfigError(f"the KV cache holds {capacity_tokens} tokens; a request needs 2")
    return min(max_model_len, capacity_tokens)


def _useful_blocks(config: EngineConfig, max_model_len: int) -> int:
    """Return how many blocks the most and longest requests could ever fill."""
    blocks_per_request = -(-max_model_len // config.block_size)
    return config.scheduler.max_num_seqs * blocks_per_request
