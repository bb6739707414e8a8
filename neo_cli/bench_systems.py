"""From the options of `neo bench` to the systems that it measures."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import PCIE_MODES, EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.scheduling.scheduler_config import MODES
from workloads.bench.system import System
from workloads.datasets import PromptMaker
from workloads.drivers.commands import VLLM_CHUNKS
from workloads.model_shapes import find_shape

if TYPE_CHECKING:
    from workloads.drivers.simulated import SimulatedSystem

PROMPT_FORMATS = ("auto", "text", "tokens")
NEO_MODES = {"neo": "auto", **{mode: mode for mode in MODES}}


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemOptions:
    """What to measure, and how to reach it.

    Args:
        systems: Names: those of `NEO_MODES` and of `VLLM_CHUNKS`.
        base_url: A server that runs already, in place of systems.
        in_process: Call the engine directly.
        hardware: Machines to simulate.
        backend: Of servers.
        endpoint: Of servers; None is the backend's.
        headers: Of servers.
        tokenizer: Folder or hub id; None is the model's own, for systems that are started.
        prompt_format: One of `PROMPT_FORMATS`; `auto` is tokens for systems that are started.
        ignore_eos: Generate as many tokens as the workload wants.
        temperature: Of sampling.
        extra_body: Added to every request.
        ready_timeout_s: Longest wait for a server.
        result_dir: Where logs go.
        log_steps: Write step logs there.

    Raises:
        ConfigError: Options are unknown or contradict each other.
    """

    systems: tuple[str, ...] = ("gpu-only", "neo")
    base_url: str | None = None
    in_process: bool = False
    hardware: tuple[str, ...] = ()
    backend: str = "openai"
    endpoint: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    prompt_format: str = "auto"
    ignore_eos: bool = True
    temperature: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)
    ready_timeout_s: float = 600.0
    result_dir: Path = Path("bench-results")
    log_steps: bool = False

    def __post_init__(self) -> None:
        chosen = [bool(self.base_url), self.in_process, bool(self.hardware)]
        if sum(chosen) > 1:
            raise ConfigError("--base-url, --in-process and --simulate exclude each other")
        if self.prompt_format not in PROMPT_FORMATS:
            raise ConfigError(
                f"prompt_format must be one of {', '.join(PROMPT_FORMATS)}, "
                f"got {self.prompt_format}"
            )
        if self.backend not in ("openai", "openai-chat"):
            raise ConfigError(f"backend must be openai or openai-chat, got {self.backend}")
        known = [*NEO_MODES, *([] if any(chosen) else VLLM_CHUNKS)]
        for name in self.systems:
            if name not in known:
                raise ConfigError(f"systems must be of {', '.join(known)}; got {name}")


def make_systems(options: SystemOptions, config: EngineConfig) -> Sequence[System]:
    """Return the systems, none of them started yet.

    Raises:
        NeoError: A system is not installed, or model, tokenizer or machine cannot be read.
    """
    if options.hardware:
        return simulated_systems(options, config)
    if not options.in_process:
        _need_client()
    if options.base_url is not None:
        return [_running_server(options, config, options.base_url)]
    shape = find_shape(config.model) if config.model and config.load_format == "dummy" else None
    config = replace(config, model=str(shape)) if shape is not None else config
    if options.in_process:
        from workloads.drivers.in_process import InProcessSystem

        return [
            InProcessSystem(
                name=name,
                config=_with_mode(config, name, options),
                ignore_eos=options.ignore_eos,
                temperature=options.temperature,
            )
            for name in options.systems
        ]
    return _started_servers(options, config)


def _need_client() -> None:
    """Check that servers can be asked.

    Raises:
        ConfigError: The HTTP client is not installed.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError(
            "measuring a server needs the package aiohttp: pip install 'neo-llm[bench]'; or call "
            "the engine directly with --in-process"
        )


def simulated_systems(options: SystemOptions, config: EngineConfig) -> "Sequence[SimulatedSystem]":
    """Return every system on every machine.

    Raises:
        NeoError: A machine or the model cannot be read.
    """
    from workloads.drivers.simulated import SimulatedSystem
    from workloads.simulation import SimulatedModel, load_hardware

    if config.model is None:
        raise ConfigError("--simulate needs --model, for example meta-llama/Llama-3.1-8B")
    model = SimulatedModel.open(config.model)
    return [
        SimulatedSystem(
            name=name,
            label=name if len(options.hardware) == 1 else f"{name}@{_short(machine)}",
            hardware=load_hardware(machine),
            model=model,
            limits=_with_mode(config, name, options).scheduler,
            pcie_attention=config.pcie_attention,
            block_size=config.block_size,
            device_blocks=config.device_kv_blocks,
            host_kv_gb=config.host_kv_gb,
            gpu_memory_utilization=config.gpu_memory_utilization,
            max_model_len=config.max_model_len,
            log_steps=options.result_dir if options.log_steps else None,
        )
        for machine in options.hardware
        for name in options.systems
    ]


def _short(machine: str) -> str:
    """Return a machine's name in labels: a file's without folder and ending."""
    return Path(machine).name.removesuffix(".json")


def _with_mode(config: EngineConfig, system: str, options: SystemOptions) -> EngineConfig:
    """Return the engine's options for one of NEO's own systems."""
    log = None
    if options.log_steps:
        options.result_dir.mkdir(parents=True, exist_ok=True)
        log = options.result_dir / f"{system}.steps.jsonl"
    mode = NEO_MODES[system]
    return replace(
        config,
        scheduler=replace(config.scheduler, mode=mode),
        pcie_attention=config.pcie_attention and mode in PCIE_MODES,
        log_steps=log,
    )


def _running_server(options: SystemOptions, config: EngineConfig, base_url: str) -> System:
    from workloads.drivers.http_client import HttpTarget
    from workloads.drivers.servers import RunningServer

    tokenizer = _load_tokenizer(options.tokenizer) if options.tokenizer else None
    as_text = options.prompt_format != "tokens"
    if not as_text and tokenizer is None:
        raise ConfigError("--prompt-format tokens with --base-url needs --tokenizer")
    return RunningServer(
        name="server",
        target=HttpTarget(
            base_url=base_url,
            model=config.model or "",
            backend=options.backend,
            endpoint=options.endpoint,
            headers=options.headers,
            ignore_eos=options.ignore_eos,
            temperature=options.temperature,
            extra_body=options.extra_body,
        ),
        maker=PromptMaker(as_text=as_text, tokenizer=tokenizer),
        tokenizer=options.tokenizer,
        ready_timeout_s=options.ready_timeout_s,
    )


def _started_servers(options: SystemOptions, config: EngineConfig) -> Sequence[System]:
    from workloads.drivers.commands import neo_command, vllm_command
    from workloads.drivers.http_client import HttpTarget
    from workloads.drivers.servers import StartedServer

    tokenizer, vocab_size = _own_tokenizer(options, config)
    as_text = options.prompt_format == "text" or options.backend == "openai-chat"
    if as_text and tokenizer is None:
        raise ConfigError("prompts as text need a tokenizer, and the model has none: --tokenizer")
    options.result_dir.mkdir(parents=True, exist_ok=True)
    facts = {
        "device_kv_blocks": config.device_kv_blocks,
        "block_size": config.block_size,
        "host_kv_gb": config.host_kv_gb,
    }
    found = []
    for name in options.systems:
        if name in VLLM_CHUNKS:
            command = vllm_command(name, config, has_tokenizer=tokenizer is not None)
        else:
            command = neo_command(_with_mode(config, name, options))
        found.append(
            StartedServer(
                name=name,
                command=command,
                target=HttpTarget(
                    base_url="",
                    model=config.model or "",
                    backend=options.backend,
                    endpoint=options.endpoint,
                    ignore_eos=options.ignore_eos,
                    temperature=options.temperature,
                    extra_body=options.extra_body,
                ),
                maker=PromptMaker(as_text=as_text, tokenizer=tokenizer, vocab_size=vocab_size),
                tokenizer=options.tokenizer,
                ready_timeout_s=options.ready_timeout_s,
                log=options.result_dir / f"{name}.server.log",
                facts=facts,
            )
        )
    return found


def _own_tokenizer(options: SystemOptions, config: EngineConfig) -> tuple[Any, int]:
    """Return a model's tokenizer, None if it has none, and the size of its vocabulary."""
    from engine.checkpoint import open_checkpoint
    from engine.model_config import ModelConfig

    checkpoint = open_checkpoint(config.model, load_format="dummy", revision=config.revision)
    vocab_size = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config).vocab_size
    if options.tokenizer is not None:
        return _load_tokenizer(options.tokenizer), vocab_size
    try:
        return checkpoint.load_tokenizer(), vocab_size
    except CheckpointError:
        return None, vocab_size


def _load_tokenizer(name: str) -> Any:
    from engine.checkpoint import open_checkpoint

    return open_checkpoint(name, load_format="dummy").load_tokenizer()
