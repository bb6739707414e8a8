"""Where cost tables come from: the cache, or a profile of this engine made now."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict

import torch

from engine.cost_model.corrected import CorrectedCostModel
from engine.cost_model.prediction import balanced_direct_share
from engine.cost_model.table import CostModelKey, StepTables, Table, TableCostModel
from engine.errors import CheckpointError, ConfigError
from engine.machine import cpu_name
from engine.paths import writable_cache_dir
from engine.profiler import METHOD
from engine.runner import ModelRunner


def make_cost_model(
    runner: ModelRunner,
    on_progress: Callable[[str], None],
    *,
    needed: bool,
    direct: bool = False,
) -> CorrectedCostModel:
    """Return the scheduler's cost model: measured tables, corrected by the steps that run.

    Args:
        runner: The engine's.
        on_progress: Told what is measured.
        needed: Whether any decision depends on times. If not, nothing is measured: times are
            nominal and say nothing.
        direct: Whether the device attends to some of the rotating rows itself.
    """
    if needed:
        measured = load_or_profile(runner, on_progress)
        measured.most_direct_share = balanced_direct_share(measured) if direct else 0.0
        return CorrectedCostModel(measured)
    nominal, zero = Table([(0, 0.0), (1, 1e-6)]), Table([(0, 0.0)])
    tables = StepTables(
        linear=nominal,
        prefill_attention=zero,
        gpu_attention=zero,
        cpu_attention=zero,
        swap=zero,
        fixed_step=nominal,
    )
    key, num_layers = cost_model_key(runner), runner.model_config.num_layers
    return CorrectedCostModel(TableCostModel(key, num_layers, tables))


def load_or_profile(
    runner: ModelRunner, on_progress: Callable[[str], None], *, force: bool = False
) -> TableCostModel:
    """Return measured tables from the cache folder; measure and keep them if there are none.

    Args:
        runner: The engine's, idle.
        on_progress: Told what is measured.
        force: Measure even if there are tables.

    Raises:
        ConfigError: The cache folder cannot be written.
    """
    key = cost_model_key(runner)
    valid_for = json.dumps([METHOD, asdict(key)])
    digest = hashlib.sha256(valid_for.encode()).hexdigest()[:16]
    path = writable_cache_dir() / "cost" / f"{digest}.json"
    if not force and path.exists():
        try:
            return TableCostModel.from_json(path.read_text(), source=str(path), key=key)
        except (CheckpointError, ConfigError, OSError) as error:
            on_progress(f"{error}; profiling again")
    tables = runner.profile(on_progress)
    model = TableCostModel(key, runner.model_config.num_layers, tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(model.to_json())
    draft.replace(path)
    return model


def cost_model_key(runner: ModelRunner) -> CostModelKey:
    """Return what a runner's tables are valid for."""
    config = runner.model_config
    shape = (
        f"{config.num_layers}x{config.hidden_size}x{config.intermediate_size} "
        f"{config.num_q_heads}/{config.num_kv_heads}x{config.head_dim} vocab {config.vocab_size}"
    )
    # Points reach as far as the pools do; sizes that differ little may share them.
    device_blocks = _power_of_two_below(runner.pool.num_blocks)
    host_blocks = _power_of_two_below(runner.host_pool.num_blocks if runner.host_pool else 0)
    is_cuda = runner.device.type == "cuda"
    return CostModelKey(
        gpu=torch.cuda.get_device_name(runner.device) if is_cuda else "none",
        cpu=cpu_name(),
        num_threads=runner.num_attention_threads,
        model_shape=f"{shape}, {device_blocks}+ device blocks, {host_blocks}+ host blocks",
        dtype=str(runner.dtype).removeprefix("torch."),
    )


def _power_of_two_below(count: int) -> int:
    return 1 << (count.bit_length() - 1) if count else 0
