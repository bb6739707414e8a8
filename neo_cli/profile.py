"""`neo profile`: the measured tables by which the scheduler decides."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.scheduling.scheduler_config import SchedulerConfig
from neo_cli import options as opt
from neo_cli.options import default

if TYPE_CHECKING:
    from engine.cost_model.table import TableCostModel


def profile(
    model: opt.Model = default(EngineConfig, "model"),
    load_format: opt.LoadFormat = default(EngineConfig, "load_format"),
    dtype: opt.Dtype = default(EngineConfig, "dtype"),
    device: opt.Device = default(EngineConfig, "device"),
    max_model_len: opt.MaxModelLen = default(EngineConfig, "max_model_len"),
    block_size: opt.BlockSize = default(EngineConfig, "block_size"),
    device_kv_blocks: opt.DeviceKvBlocks = default(EngineConfig, "device_kv_blocks"),
    host_kv_gb: opt.HostKvGb = default(EngineConfig, "host_kv_gb"),
    threads: opt.Threads = default(EngineConfig, "threads"),
    force: Annotated[
        bool, typer.Option("--force", help="Measure again even if there are tables.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> int:
    """Measure how long each part of a step takes here, or show what was measured.

    The tables are kept in the cache folder, one set per GPU, CPU, thread count, model shape and
    dtype; serving measures them by itself when they are missing.
    """
    try:
        config = EngineConfig(
            model=model,
            load_format=load_format,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            block_size=block_size,
            device_kv_blocks=device_kv_blocks,
            host_kv_gb=host_kv_gb,
            threads=threads,
            scheduler=SchedulerConfig(mode="asymmetric"),
        )
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    tables = _measure(config, force)
    if as_json:
        print(tables.to_json())
    else:
        _print_tables(tables)
    return 0


def _measure(config: EngineConfig, force: bool) -> "TableCostModel":
    from engine.checkpoint import open_checkpoint
    from engine.cost_tables import load_or_profile
    from engine.runner import ModelRunner
    from neo_cli.progress import loading_status

    with loading_status() as on_progress:
        checkpoint = open_checkpoint(config.model, load_format=config.load_format)
        runner = ModelRunner(config, checkpoint, on_progress)
        try:
            return load_or_profile(runner, on_progress, force=force)
        finally:
            runner.close()


def _print_tables(model: "TableCostModel") -> None:
    from rich.console import Console
    from rich.table import Table

    content: dict[str, Any] = json.loads(model.to_json())
    key = content["key"]
    print(", ".join(f"{name} {value}" for name, value in key.items()))
    units = {
        "linear": "rows, one layer",
        "prefill_attention": "(query, key) pairs, one layer",
        "gpu_attention": "tokens, one layer",
        "cpu_attention": "tokens, one layer",
        "swap": "tokens, all layers",
        "fixed_step": "sampled rows, one step",
    }
    table = Table(title="measured times in µs", title_justify="left")
    for column in ("part", "by", "points"):
        table.add_column(column)
    for name, unit in units.items():
        points = ", ".join(f"{x:g}: {y * 1e6:.4g}" for x, y in content["tables"][name])
        table.add_row(name.replace("_", " "), unit, points)
    for name in (
        "gpu_attention_row_s",
        "cpu_attention_row_s",
        "handover_s",
        "launch_s",
        "handover_launch_s",
    ):
        value = content["tables"][name] * 1e6
        table.add_row(name.removesuffix("_s").replace("_", " "), "one layer", f"{value:.4g}")
    Console(soft_wrap=False).print(table)
