"""The commands that start servers for a comparison, all with the same room for KV on the device."""

import shutil
import sys

from engine.config import EngineConfig
from engine.errors import ConfigError
from workloads.drivers.versions import package_version

_MAX_QUEUE = 1_000_000
"""A benchmark sends all at once; a server that turns requests away would be measured with fewer."""
VLLM_CHUNKS = {"vllm": None, "vllm-256": 256, "vllm-512": 512}
"""vLLM as its users run it, and with the prefill chunks that the NEO paper compared with."""


def neo_command(config: EngineConfig) -> tuple[str, ...]:
    """Return what starts `neo serve` with an engine's options."""
    limits = config.scheduler
    options: dict[str, object] = {
        "--model": config.model,
        "--revision": config.revision,
        "--load-format": config.load_format,
        "--dtype": config.dtype,
        "--device": config.device,
        "--max-model-len": config.max_model_len,
        "--block-size": config.block_size,
        "--device-kv-blocks": config.device_kv_blocks,
        "--host-kv-gb": config.host_kv_gb,
        "--gpu-memory-utilization": config.gpu_memory_utilization,
        "--threads": config.threads,
        "--max-num-seqs": limits.max_num_seqs,
        "--max-num-batched-tokens": limits.max_num_batched_tokens,
        "--mode": limits.mode,
        "--tpot-limit-ms": limits.tpot_limit_ms,
        "--log-steps": config.log_steps,
        "--max-queue": _MAX_QUEUE,
    }
    flags = ["--enforce-eager"] if config.enforce_eager else []
    if config.pcie_attention:
        flags.append("--pcie-attention")
    if config.async_scheduling is not None:
        flags.append(f"--{'' if config.async_scheduling else 'no-'}async-scheduling")
    start = (sys.executable, "-m", "neo_cli.main", "serve", "--host", "127.0.0.1")
    return (*start, "--port", "{port}", *_given(options), *flags)


def vllm_command(system: str, config: EngineConfig, *, has_tokenizer: bool) -> tuple[str, ...]:
    """Return what starts vLLM with the same limits: CUDA graphs on, prefix caching off.

    Args:
        system: One of `VLLM_CHUNKS`.
        config: NEO's options, of which those that vLLM has are passed on.
        has_tokenizer: Whether the model's folder has a tokenizer.

    Raises:
        ConfigError: vLLM is not installed.
    """
    program = shutil.which("vllm")
    if program is None or package_version("vllm") is None:
        raise ConfigError(
            "the system vllm needs vLLM, which is not installed here: pip install vllm, or leave "
            "it out of --systems"
        )
    if config.model is None:
        raise ConfigError("the system vllm needs --model: it cannot read NEO's embedded one")
    limits = config.scheduler
    chunk = VLLM_CHUNKS[system] or limits.max_num_batched_tokens
    options: dict[str, object] = {
        "--load-format": "dummy" if config.load_format == "dummy" else "auto",
        "--revision": config.revision,
        "--dtype": config.dtype,
        "--max-model-len": config.max_model_len,
        "--block-size": config.block_size,
        "--num-gpu-blocks-override": config.device_kv_blocks,
        "--gpu-memory-utilization": config.gpu_memory_utilization,
        "--max-num-seqs": min(limits.max_num_seqs, chunk),
        "--max-num-batched-tokens": chunk,
    }
    flags = ["--no-enable-prefix-caching", "--enable-chunked-prefill"]
    if config.enforce_eager:
        flags.append("--enforce-eager")
    if not has_tokenizer:
        flags.append("--skip-tokenizer-init")
    start = (program, "serve", config.model, "--host", "127.0.0.1", "--port", "{port}")
    return (*start, *_given(options), *flags)


def _given(options: dict[str, object]) -> list[str]:
    given = {name: str(value) for name, value in options.items() if value is not None}
    return [part for pair in given.items() for part in pair]
