"""`neo bench`: measure or simulate serving, and compare systems."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.scheduling.scheduler_config import SchedulerConfig
from neo_cli import options as opt
from neo_cli.options import default, option

if TYPE_CHECKING:
    from neo_cli.bench_systems import SystemOptions
    from workloads.bench.config import BenchConfig

SYSTEM_PANEL = "What is measured"
WORKLOAD_PANEL = "Workload"
LOAD_PANEL = "Load"
RESULT_PANEL = "Results"
ALL_MACHINES = "all"


def bench(
    systems: Annotated[
        str,
        option(
            "Systems to start in turn: neo, gpu-only, asymmetric, vllm, vllm-256, vllm-512.",
            SYSTEM_PANEL,
        ),
    ] = "gpu-only,neo",
    base_url: Annotated[
        str | None, option("Measure this OpenAI-compatible server instead.", SYSTEM_PANEL)
    ] = None,
    in_process: Annotated[
        bool, option("Call the engine directly, without a server.", SYSTEM_PANEL, "--in-process")
    ] = False,
    simulate: Annotated[
        str | None,
        option(
            "Simulate these machines: names, JSON files, or `all` for what each would gain.",
            SYSTEM_PANEL,
        ),
    ] = None,
    backend: Annotated[
        str, option("Of servers: openai (completions) or openai-chat.", SYSTEM_PANEL)
    ] = "openai",
    endpoint: Annotated[
        str | None, option("Path, if it is not the backend's own.", SYSTEM_PANEL)
    ] = None,
    header: Annotated[
        list[str] | None, option("KEY=VALUE sent to the server; repeatable.", SYSTEM_PANEL)
    ] = None,
    tokenizer: Annotated[
        str | None,
        option("Makes and counts prompts; the model's own if left out.", SYSTEM_PANEL),
    ] = None,
    prompt_format: Annotated[
        str,
        option("text or tokens; auto is tokens for systems that are started.", SYSTEM_PANEL),
    ] = "auto",
    ignore_eos: Annotated[
        bool, option("Have as many tokens generated as the workload says.", SYSTEM_PANEL)
    ] = True,
    temperature: Annotated[float, option("Of sampling; 0 is greedy.", SYSTEM_PANEL)] = 0.0,
    extra_body: Annotated[
        str | None,
        option("JSON object added to every request; null takes a key away.", SYSTEM_PANEL),
    ] = None,
    ready_check_timeout_sec: Annotated[
        float, option("Longest wait for a server to answer.", SYSTEM_PANEL)
    ] = 600.0,
    dataset_name: Annotated[
        str,
        option(
            "synthetic (or random), summarize, azure-code, azure-conv, sharegpt, custom, lengths.",
            WORKLOAD_PANEL,
        ),
    ] = "synthetic",
    dataset_path: Annotated[
        str | None, option("Its file; for summarize also a folder or hub id.", WORKLOAD_PANEL)
    ] = None,
    num_prompts: Annotated[int, option("Requests of each point.", WORKLOAD_PANEL)] = 200,
    seed: Annotated[int, option("Of workload and arrivals.", WORKLOAD_PANEL)] = 0,
    input_len: Annotated[
        int,
        option(
            "Mean prompt tokens of synthetic.",
            WORKLOAD_PANEL,
            "--input-len",
            "--random-input-len",
        ),
    ] = 1000,
    output_len: Annotated[
        str | None,
        option(
            "Output tokens, one or a list such as 50,100; the data set's own if left out.",
            WORKLOAD_PANEL,
            "--output-len",
            "--random-output-len",
        ),
    ] = None,
    range_ratio: Annotated[
        float,
        option(
            "Lengths of synthetic vary by this share, uniformly.",
            WORKLOAD_PANEL,
            "--range-ratio",
            "--random-range-ratio",
        ),
    ] = 0.1,
    no_oversample: Annotated[
        bool,
        option("Do not repeat a data set that is too short.", WORKLOAD_PANEL, "--no-oversample"),
    ] = False,
    disable_shuffle: Annotated[
        bool, option("Take texts in their file's order.", WORKLOAD_PANEL, "--disable-shuffle")
    ] = False,
    skip_chat_template: Annotated[
        bool, option("Send custom prompts as they are.", WORKLOAD_PANEL, "--skip-chat-template")
    ] = False,
    request_rate: Annotated[
        str, option("Requests a second, one or a list such as 1,2,4,inf.", LOAD_PANEL)
    ] = "inf",
    burstiness: Annotated[
        float, option("1 is Poisson, less comes in bursts, inf is constant.", LOAD_PANEL)
    ] = 1.0,
    ramp_up_strategy: Annotated[str | None, option("linear or exponential.", LOAD_PANEL)] = None,
    ramp_up_start_rps: Annotated[
        float | None, option("Rate at the first request.", LOAD_PANEL)
    ] = None,
    ramp_up_end_rps: Annotated[
        float | None, option("Rate at the last request.", LOAD_PANEL)
    ] = None,
    use_trace_arrivals: Annotated[
        bool, option("Send requests when the trace says.", LOAD_PANEL, "--use-trace-arrivals")
    ] = False,
    max_concurrency: Annotated[
        int | None, option("Most requests under way at once.", LOAD_PANEL)
    ] = None,
    num_warmups: Annotated[
        int, option("Requests before the first point that do not count.", LOAD_PANEL)
    ] = 8,
    repeats: Annotated[
        int, option("Measurements of each point; systems take turns.", LOAD_PANEL)
    ] = 1,
    metric_percentiles: Annotated[
        str, option("Percentiles of each metric, a list.", RESULT_PANEL)
    ] = "99",
    goodput: Annotated[
        list[str] | None,
        option("METRIC:MS with ttft, tpot or e2el; all must hold; repeatable.", RESULT_PANEL),
    ] = None,
    save_detailed: Annotated[
        bool, option("Keep every request's times and text.", RESULT_PANEL, "--save-detailed")
    ] = False,
    result_dir: Annotated[
        Path, option("A JSON file a point; finished points are kept.", RESULT_PANEL)
    ] = Path("bench-results"),
    overwrite: Annotated[
        bool, option("Measure finished points again.", RESULT_PANEL, "--overwrite")
    ] = False,
    label: Annotated[str | None, option("Name of the results.", RESULT_PANEL)] = None,
    metadata: Annotated[
        list[str] | None, option("KEY=VALUE kept in the results; repeatable.", RESULT_PANEL)
    ] = None,
    baseline: Annotated[
        str, option("The system that others are compared with.", RESULT_PANEL)
    ] = "gpu-only",
    log_steps: Annotated[
        bool, option("Write step logs beside the results.", RESULT_PANEL, "--log-steps")
    ] = False,
    as_json: Annotated[bool, option("Print the results as JSON.", RESULT_PANEL, "--json")] = False,
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
    max_num_seqs: opt.MaxNumSeqs = default(SchedulerConfig, "max_num_seqs"),
    max_num_batched_tokens: opt.MaxNumBatchedTokens = default(
        SchedulerConfig, "max_num_batched_tokens"
    ),
    tpot_limit_ms: opt.TpotLimitMs = default(SchedulerConfig, "tpot_limit_ms"),
    enforce_eager: opt.EnforceEager = default(EngineConfig, "enforce_eager"),
    async_scheduling: opt.AsyncScheduling = default(EngineConfig, "async_scheduling"),
) -> int:
    """Measure serving under load, in the manner of `vllm bench serve`.

    Starts systems in turn, or drives a server that runs, the engine in this process, or a simulated
    machine. Every point is a result file; an interrupted sweep goes on where it stopped.
    """
    from neo_cli.bench_systems import SystemOptions
    from workloads.arrivals import ArrivalConfig
    from workloads.bench.config import BenchConfig
    from workloads.datasets import DatasetConfig
    from workloads.metrics import MetricsConfig

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
            enforce_eager=enforce_eager,
            async_scheduling=async_scheduling,
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                tpot_limit_ms=tpot_limit_ms,
            ),
        )
        measured = BenchConfig(
            dataset=DatasetConfig(
                dataset_name=dataset_name,
                dataset_path=dataset_path,
                num_prompts=num_prompts,
                seed=seed,
                input_len=input_len,
                range_ratio=range_ratio,
                no_oversample=no_oversample,
                disable_shuffle=disable_shuffle,
                skip_chat_template=skip_chat_template,
            ),
            arrivals=ArrivalConfig(
                burstiness=burstiness,
                ramp_up_strategy=ramp_up_strategy,
                ramp_up_start_rps=ramp_up_start_rps,
                ramp_up_end_rps=ramp_up_end_rps,
                seed=seed,
            ),
            request_rates=_numbers("request_rate", request_rate, float),
            output_lens=_numbers("output_len", output_len or "", int),
            use_trace_arrivals=use_trace_arrivals,
            max_concurrency=max_concurrency,
            num_warmups=num_warmups,
            repeats=repeats,
            metrics=MetricsConfig(
                metric_percentiles=_numbers("metric_percentiles", metric_percentiles, float),
                goodput=_goodput(goodput or []),
                save_detailed=save_detailed,
            ),
            result_dir=result_dir,
            overwrite=overwrite,
            label=label,
            metadata=_pairs("metadata", metadata or []),
        )
        options = SystemOptions(
            systems=tuple(_items(systems)),
            base_url=base_url,
            in_process=in_process,
            hardware=() if simulate is None else tuple(_machines(simulate)),
            backend=backend,
            endpoint=endpoint,
            headers=_pairs("header", header or []),
            tokenizer=tokenizer,
            prompt_format=prompt_format,
            ignore_eos=ignore_eos,
            temperature=temperature,
            extra_body=_json_object("extra_body", extra_body),
            ready_timeout_s=ready_check_timeout_sec,
            result_dir=result_dir,
            log_steps=log_steps,
        )
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if simulate == ALL_MACHINES:
        return _survey(measured, options, config, as_json)
    return _sweep(measured, options, config, baseline, as_json)


def _sweep(
    measured: "BenchConfig",
    options: "SystemOptions",
    config: EngineConfig,
    baseline: str,
    as_json: bool,
) -> int:
    """Measure all points; show and print them; exit 1 if a request failed."""
    from neo_cli.bench_systems import make_systems
    from neo_cli.bench_table import BenchDisplay
    from workloads.bench.sweep import Sweep

    is_simulated = bool(options.hardware)
    title = f"{measured.dataset.name}, {measured.dataset.num_prompts} requests a point"
    display = BenchDisplay(f"SIMULATED: {title}" if is_simulated else title, baseline)
    results = []
    try:
        with display.shown():
            systems = make_systems(options, config)
            for found in Sweep(measured, systems, display.on_progress, display.on_point).run():
                display.add(found.figures, found.was_kept)
                results.append(found.figures)
    finally:
        if as_json:
            print(json.dumps(results, indent=2))
        else:
            display.print_results()
    return 1 if any(result["failed"] for result in results) else 0


def _survey(
    measured: "BenchConfig", options: "SystemOptions", config: EngineConfig, as_json: bool
) -> int:
    """Print what every machine would gain, and write it to a result file."""
    from dataclasses import asdict, replace

    from neo_cli.bench_systems import simulated_systems
    from neo_cli.bench_table import print_survey
    from neo_cli.progress import loading_status
    from workloads.bench.survey import survey
    from workloads.datasets import load_workload
    from workloads.result_file import circumstances, write_json

    output_len = measured.output_lens[0] if measured.output_lens else None
    dataset = replace(measured.dataset, output_len=output_len)
    reports = []
    with loading_status() as on_progress:
        machines = simulated_systems(replace(options, systems=("neo",)), config)
        workload = load_workload(dataset, None)
        on_progress(f"simulating {len(machines)} machines")
        for report in survey(machines, workload.requests):
            reports.append(report)
            on_progress(f"simulated {report.machine}")
    content = circumstances(
        {"model": config.model, "dataset": asdict(dataset), "workload": workload.source},
        simulated=True,
    )
    content["machines"] = [{**asdict(r), "gain": r.gain} for r in reports]
    path = write_json(measured.result_dir / "survey.json", content)
    if as_json:
        print(json.dumps(content["machines"], indent=2))
    else:
        print_survey(reports, f"{config.model}, {workload.source}; written to {path}")
    return 0


def _machines(text: str) -> list[str]:
    from workloads.simulation.hardware import hardware_names

    return hardware_names() if text == ALL_MACHINES else _items(text)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Read a list of numbers.

    Raises:
        ConfigError: One is none.
    """
    found = []
    for item in _items(text):
        try:
            found.append(kind(item))
        except ValueError as error:
            raise ConfigError(f"{name} must be a list of numbers, got {item!r}") from error
        if isinstance(found[-1], float) and math.isnan(found[-1]):
            raise ConfigError(f"{name} must be a list of numbers, got {item!r}")
    return tuple(found)


def _goodput(items: list[str]) -> dict[str, float] | None:
    limits = {}
    for item in items:
        for part in item.split():
            name, _, limit = part.partition(":")
            try:
                limits[name] = float(limit)
            except ValueError as error:
                raise ConfigError(f"goodput must be METRIC:MILLISECONDS, got {part!r}") from error
    return limits or None


def _pairs(name: str, items: list[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ConfigError(f"{name} must be KEY=VALUE, got {item!r}")
        pairs[key] = value
    return pairs


def _json_object(name: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} must be a JSON object, got {text!r}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, got {text!r}")
    return value
