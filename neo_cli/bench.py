"""`neo bench`: measure or simulate serving, and compare systems."""

import json

import typer

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.scheduling.scheduler_config import SchedulerConfig
from neo_cli import bench_options as bo
from neo_cli import options as opt
from neo_cli.bench_parsing import goodput_limits, items, json_object, listed, numbers, pairs
from neo_cli.bench_systems import SystemOptions
from neo_cli.options import default
from workloads.arrivals import ArrivalConfig
from workloads.bench.config import BenchConfig
from workloads.datasets import DatasetConfig
from workloads.metrics_config import MetricsConfig

ALL_MACHINES = "all"
BASELINE = "gpu-only"


def bench(
    systems: bo.Systems = ",".join(default(SystemOptions, "systems")),
    base_url: bo.BaseUrl = default(SystemOptions, "base_url"),
    in_process: bo.InProcess = default(SystemOptions, "in_process"),
    simulate: bo.Simulate = None,
    backend: bo.Backend = default(SystemOptions, "backend"),
    endpoint: bo.Endpoint = default(SystemOptions, "endpoint"),
    header: bo.Header = None,
    tokenizer: bo.Tokenizer = default(SystemOptions, "tokenizer"),
    prompt_format: bo.PromptFormat = default(SystemOptions, "prompt_format"),
    ignore_eos: bo.IgnoreEos = default(SystemOptions, "ignore_eos"),
    temperature: bo.Temperature = default(SystemOptions, "temperature"),
    extra_body: bo.ExtraBody = None,
    ready_check_timeout_sec: bo.ReadyCheckTimeoutSec = default(SystemOptions, "ready_timeout_s"),
    dataset_name: bo.DatasetName = default(DatasetConfig, "dataset_name"),
    dataset_path: bo.DatasetPath = default(DatasetConfig, "dataset_path"),
    num_prompts: bo.NumPrompts = default(DatasetConfig, "num_prompts"),
    seed: bo.Seed = default(DatasetConfig, "seed"),
    input_len: bo.InputLen = default(DatasetConfig, "input_len"),
    output_len: bo.OutputLen = None,
    range_ratio: bo.RangeRatio = default(DatasetConfig, "range_ratio"),
    no_oversample: bo.NoOversample = default(DatasetConfig, "no_oversample"),
    disable_shuffle: bo.DisableShuffle = default(DatasetConfig, "disable_shuffle"),
    skip_chat_template: bo.SkipChatTemplate = default(DatasetConfig, "skip_chat_template"),
    request_rate: bo.RequestRate = listed(default(BenchConfig, "request_rates")),
    burstiness: bo.Burstiness = default(ArrivalConfig, "burstiness"),
    ramp_up_strategy: bo.RampUpStrategy = default(ArrivalConfig, "ramp_up_strategy"),
    ramp_up_start_rps: bo.RampUpStartRps = default(ArrivalConfig, "ramp_up_start_rps"),
    ramp_up_end_rps: bo.RampUpEndRps = default(ArrivalConfig, "ramp_up_end_rps"),
    use_trace_arrivals: bo.UseTraceArrivals = default(BenchConfig, "use_trace_arrivals"),
    max_concurrency: bo.MaxConcurrency = default(BenchConfig, "max_concurrency"),
    num_warmups: bo.NumWarmups = default(BenchConfig, "num_warmups"),
    repeats: bo.Repeats = default(BenchConfig, "repeats"),
    metric_percentiles: bo.MetricPercentiles = listed(default(MetricsConfig, "metric_percentiles")),
    goodput: bo.Goodput = None,
    save_detailed: bo.SaveDetailed = default(MetricsConfig, "save_detailed"),
    result_dir: bo.ResultDir = default(BenchConfig, "result_dir"),
    overwrite: bo.Overwrite = default(BenchConfig, "overwrite"),
    label: bo.Label = default(BenchConfig, "label"),
    metadata: bo.Metadata = None,
    baseline: bo.Baseline = BASELINE,
    log_steps: bo.LogSteps = default(SystemOptions, "log_steps"),
    as_json: bo.AsJson = False,
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
    pcie_attention: opt.PcieAttention = default(EngineConfig, "pcie_attention"),
    enforce_eager: opt.EnforceEager = default(EngineConfig, "enforce_eager"),
    async_scheduling: opt.AsyncScheduling = default(EngineConfig, "async_scheduling"),
) -> int:
    """Measure serving under load, in the manner of `vllm bench serve`.

    Starts systems in turn, or drives a server that runs, the engine in this process, or a simulated
    machine. Every point is a result file; an interrupted sweep goes on where it stopped.
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
            pcie_attention=pcie_attention,
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
            request_rates=numbers("request_rate", request_rate, float),
            output_lens=numbers("output_len", output_len or "", int),
            use_trace_arrivals=use_trace_arrivals,
            max_concurrency=max_concurrency,
            num_warmups=num_warmups,
            repeats=repeats,
            metrics=MetricsConfig(
                metric_percentiles=numbers("metric_percentiles", metric_percentiles, float),
                goodput=goodput_limits(goodput or []),
                save_detailed=save_detailed,
            ),
            result_dir=result_dir,
            overwrite=overwrite,
            label=label,
            metadata=pairs("metadata", metadata or []),
        )
        options = SystemOptions(
            systems=tuple(items(systems)),
            base_url=base_url,
            in_process=in_process,
            hardware=() if simulate is None else tuple(_machines(simulate)),
            backend=backend,
            endpoint=endpoint,
            headers=pairs("header", header or []),
            tokenizer=tokenizer,
            prompt_format=prompt_format,
            ignore_eos=ignore_eos,
            temperature=temperature,
            extra_body=json_object("extra_body", extra_body),
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
    measured: BenchConfig,
    options: SystemOptions,
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
    measured: BenchConfig, options: SystemOptions, config: EngineConfig, as_json: bool
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

    return hardware_names() if text == ALL_MACHINES else items(text)
