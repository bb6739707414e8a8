"""`neo build-kernels`: compile, check and measure NEO's own kernels."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import EngineConfig
from engine.errors import ConfigError, NeoError
from neo_cli import options as opt
from neo_cli.options import default


def build_kernels(
    force: Annotated[
        bool, typer.Option("--force", help="Build even if everything is up to date.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the compilers' output.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the kernels with torch afterwards.")
    ] = False,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure attention beside plain reading of memory.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results of --check and --bench as JSON.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads for --check and --bench; all cores but one if left out."),
    ] = None,
    ispc_objects: Annotated[
        Path | None,
        typer.Option(help="Link ISPC objects from this folder instead of compiling them."),
    ] = None,
    export_ispc_objects: Annotated[
        Path | None,
        typer.Option(help="Also write the ISPC objects here, for a machine without ISPC."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Also compile this model's GPU kernels, for this machine's GPU."),
    ] = None,
    dtype: opt.Dtype = default(EngineConfig, "dtype"),
    block_size: opt.BlockSize = default(EngineConfig, "block_size"),
) -> int:
    """Compile the CPU attention kernels into the cache folder; nothing to do if up to date."""
    from cpu_kernels.errors import KernelBuildError

    if threads is not None and threads < 1:
        raise typer.BadParameter(f"threads must be at least 1, got {threads}")
    try:
        gpu_config = EngineConfig(model=model, dtype=dtype, block_size=block_size)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    results: dict[str, Any] = {}
    passed = True
    try:
        results["module"] = _build(force, verbose, ispc_objects, export_ispc_objects, as_json)
        if check:
            results["check"], passed = _check(threads, as_json)
        if bench:
            results["bench"] = _bench(threads, as_json)
    except KernelBuildError as error:
        raise ConfigError(str(error)) from error
    if model is not None:
        results["gpu_kernel_variants"] = _build_gpu(gpu_config, as_json)
    if as_json:
        print(json.dumps(results, indent=2))
    if not passed:
        raise NeoError("the CPU kernels failed their numeric self-test; rebuild with --force")
    return 0


def _build(
    force: bool, verbose: bool, ispc_objects: Path | None, export: Path | None, quiet: bool
) -> str:
    """Build the CPU kernels, export their ISPC objects if asked to, and return the module."""
    from cpu_kernels import build as kernels
    from engine.paths import cache_dir, writable_cache_dir
    from neo_cli.progress import loading_status, print_line

    fresh = not force and kernels.is_built(cache_dir()) is not None
    writable_cache_dir()
    show_lines = verbose or not sys.stderr.isatty()
    with contextlib.nullcontext(print_line) if show_lines else loading_status() as on_progress:
        built = kernels.build(
            cache_dir(),
            force=force,
            verbose=verbose,
            ispc_objects=ispc_objects,
            on_progress=on_progress,
        )
        if export is not None:
            kernels.export_ispc_objects(cache_dir(), export, on_progress=on_progress)
    if not quiet:
        print(f"CPU kernels {'are up to date' if fresh else 'built'}: {built}")
    return str(built)


def _build_gpu(config: EngineConfig, quiet: bool) -> int:
    """Compile a model's GPU kernels and return how many variants it needs."""
    from engine.precompile import precompile_gpu_kernels
    from neo_cli.progress import loading_status

    with loading_status() as on_progress:
        on_progress("compiling GPU kernels")
        num_variants = precompile_gpu_kernels(config)
    if not quiet:
        print(f"GPU kernels ready: {num_variants} variants")
    return num_variants


def _check(threads: int | None, quiet: bool) -> tuple[list[dict[str, Any]], bool]:
    """Run the numeric self-test and print it unless `quiet`."""
    from dataclasses import asdict

    from cpu_kernels.selftest import run_selftest
    from engine.paths import cache_dir

    results = [asdict(result) for result in run_selftest(cache_dir(), threads)]
    if not quiet:
        _print_table("self-test against float32 torch", results)
    return results, all(result["passed"] for result in results)


def _bench(threads: int | None, quiet: bool) -> list[dict[str, Any]]:
    """Measure attention and plain reading and print both unless `quiet`."""
    from dataclasses import asdict

    from cpu_kernels.bench import run_bench
    from engine.paths import cache_dir
    from neo_cli.progress import loading_status

    with loading_status() as on_progress:
        measured = run_bench(cache_dir(), num_threads=threads, on_progress=on_progress)
    results = [asdict(result) for result in measured]
    if not quiet:
        _print_table("decode attention beside plain reading, GB/s", results)
    return results


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
