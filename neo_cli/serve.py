"""`neo serve`: an OpenAI-compatible server."""

import contextlib
from typing import Annotated

import typer

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.scheduling.scheduler_config import SchedulerConfig
from engine.server.server_config import ServerConfig
from neo_cli import options as opt
from neo_cli.options import default, option

SERVER_PANEL = "Server"


def serve(
    host: Annotated[str, option("Address to listen on.", SERVER_PANEL)] = default(
        ServerConfig, "host"
    ),
    port: Annotated[int, option("TCP port; 0 takes a free one.", SERVER_PANEL)] = default(
        ServerConfig, "port"
    ),
    served_model_names: Annotated[
        list[str] | None,
        option(
            "What requests call the model; repeatable; its own name if left out.",
            SERVER_PANEL,
            "--served-model-name",
        ),
    ] = None,
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="NEO_API_KEYS",
            help="A key that requests must bring; repeatable. The variable, which other users of "
            "the machine cannot read, holds keys with spaces between them.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    max_queue: Annotated[
        int, option("Most requests that may wait; the others get status 429.", SERVER_PANEL)
    ] = default(ServerConfig, "max_queue"),
    request_timeout_s: Annotated[
        float | None,
        option(
            "Seconds from a request's arrival to its end; no limit if left out.",
            SERVER_PANEL,
            "--request-timeout",
        ),
    ] = default(ServerConfig, "request_timeout_s"),
    shutdown_timeout_s: Annotated[
        float,
        option(
            "Seconds that running requests get after SIGTERM or Ctrl-C.",
            SERVER_PANEL,
            "--shutdown-timeout",
        ),
    ] = default(ServerConfig, "shutdown_timeout_s"),
    max_body_mb: Annotated[float, option("Most MiB of a request's body.", SERVER_PANEL)] = default(
        ServerConfig, "max_body_mb"
    ),
    tool_call_parser: Annotated[
        str | None,
        option(
            "How the model writes tool calls: hermes, llama3_json or mistral; from its chat "
            "template if left out.",
            SERVER_PANEL,
        ),
    ] = default(ServerConfig, "tool_call_parser"),
    log_json: Annotated[
        bool, option("Log one JSON object a line.", SERVER_PANEL, "--log-json")
    ] = default(ServerConfig, "log_json"),
    model: opt.Model = default(EngineConfig, "model"),
    revision: opt.Revision = default(EngineConfig, "revision"),
    load_format: opt.LoadFormat = default(EngineConfig, "load_format"),
    dtype: opt.Dtype = default(EngineConfig, "dtype"),
    device: opt.Device = default(EngineConfig, "device"),
    max_model_len: opt.MaxModelLen = default(EngineConfig, "max_model_len"),
    block_size: opt.BlockSize = default(EngineConfig, "block_size"),
    device_kv_blocks: opt.DeviceKvBlocks = default(EngineConfig, "device_kv_blocks"),
    host_kv_gb: opt.HostKvGb = default(EngineConfig, "host_kv_gb"),
    gpu_memory_utilization: opt.GpuMemoryUtilization = default(
        EngineConfig, "gpu_memory_utilization"
    ),
    threads: opt.Threads = default(EngineConfig, "threads"),
    seed: Annotated[
        int, option("Of dummy weights and of requests without a seed.", opt.MODEL_PANEL)
    ] = default(EngineConfig, "seed"),
    max_num_seqs: opt.MaxNumSeqs = default(SchedulerConfig, "max_num_seqs"),
    max_num_batched_tokens: opt.MaxNumBatchedTokens = default(
        SchedulerConfig, "max_num_batched_tokens"
    ),
    mode: opt.Mode = default(SchedulerConfig, "mode"),
    tpot_limit_ms: opt.TpotLimitMs = default(SchedulerConfig, "tpot_limit_ms"),
    pcie_attention: opt.PcieAttention = default(EngineConfig, "pcie_attention"),
    enforce_eager: opt.EnforceEager = default(EngineConfig, "enforce_eager"),
    async_scheduling: opt.AsyncScheduling = default(EngineConfig, "async_scheduling"),
    log_steps: opt.LogSteps = default(EngineConfig, "log_steps"),
) -> int:
    """Serve a model with OpenAI's API.

    SIGTERM and Ctrl-C let running requests end; a second signal stops at once.
    """
    try:
        config = EngineConfig(
            model=model,
            revision=revision,
            load_format=load_format,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            block_size=block_size,
            device_kv_blocks=device_kv_blocks,
            host_kv_gb=host_kv_gb,
            gpu_memory_utilization=gpu_memory_utilization,
            threads=threads,
            seed=seed,
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                mode=mode,
                tpot_limit_ms=tpot_limit_ms,
            ),
            pcie_attention=pcie_attention,
            enforce_eager=enforce_eager,
            async_scheduling=async_scheduling,
            log_steps=log_steps,
        )
        server_config = ServerConfig(
            host=host,
            port=port,
            served_model_names=tuple(served_model_names or ()),
            api_keys=tuple(api_keys or ()),
            max_queue=max_queue,
            request_timeout_s=request_timeout_s,
            shutdown_timeout_s=shutdown_timeout_s,
            max_body_mb=max_body_mb,
            tool_call_parser=tool_call_parser,
            log_json=log_json,
        )
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    return _run(config, server_config)


def _run(config: EngineConfig, server_config: ServerConfig) -> int:
    try:
        from engine.server.run import run_server
    except ModuleNotFoundError as error:
        if str(error.name).startswith("engine"):
            raise
        raise ConfigError(
            f"neo serve needs the package {error.name}: pip install 'neo-llm[serve]'"
        ) from error
    from neo_cli.progress import loading_status

    with contextlib.ExitStack() as stack:

        def on_ready(line: str) -> None:
            stack.close()  # the spinner ends where the serving begins
            print(f"neo: {line}", flush=True)

        on_progress = stack.enter_context(loading_status())
        return run_server(config, server_config, on_progress=on_progress, on_ready=on_ready)
