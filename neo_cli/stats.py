"""The statistics of a run, as a table and as JSON."""

import sys

from engine.llm_engine import LLMEngine
from neo_cli.two_columns import print_two_columns

ROW_KINDS = ("gdec", "gprf", "cdec", "cprf", "rotating")


def stats_dict(engine: LLMEngine) -> dict[str, float | int | str]:
    """Return what an engine did, by name with unit suffixes."""
    stats, runner = engine.stats, engine.runner
    return {
        "model": engine.model_name,
        "device": str(runner.device),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "load_time_s": round(stats.load_time_s, 3),
        "num_steps": stats.num_steps,
        "step_time_s": round(stats.step_time_s, 3),
        "prefill_tokens": stats.prefill_tokens,
        "generated_tokens": stats.generated_tokens,
        "output_tokens_per_s": round(_rate(stats.generated_tokens, stats.step_time_s), 2),
        "device_busy_share": round(_rate(stats.device_busy_time_s, stats.step_time_s), 3),
        "graph_steps": stats.graph_steps,
        "graph_captures": stats.graph_captures,
        "num_preemptions": stats.num_preemptions,
        "kv_blocks": runner.pool.num_blocks,
        "kv_blocks_peak": stats.peak_used_blocks,
        "kv_cache_bytes": runner.kv_cache_bytes,
        **_offload_dict(engine),
    }


def _offload_dict(engine: LLMEngine) -> dict[str, float | int]:
    """Return what the host did, if there is a host pool."""
    stats, runner = engine.stats, engine.runner
    if runner.host_pool is None:
        return {}
    block_bytes = runner.kv_cache_bytes // runner.pool.num_blocks
    num_steps = max(1, stats.num_steps)
    return {
        "host_kv_blocks": runner.host_pool.num_blocks,
        "host_kv_blocks_peak": stats.peak_used_host_blocks,
        "host_kv_cache_bytes": runner.host_kv_cache_bytes,
        **{f"steps_{mode}": count for mode, count in sorted(stats.steps_by_mode.items())},
        **{f"{kind}_per_step": round(stats.rows[kind] / num_steps, 2) for kind in ROW_KINDS},
        "cpu_busy_share": round(_rate(stats.cpu_attention_time_s, stats.step_time_s), 3),
        "swapped_out_bytes": stats.swapped_out_blocks * block_bytes,
        "swapped_in_bytes": stats.swapped_in_blocks * block_bytes,
        "predicted_over_measured": round(
            _rate(stats.predicted_step_time_s, stats.matched_step_time_s), 3
        ),
        "num_failed_steps": stats.num_failed_steps,
    }


def print_stats(engine: LLMEngine) -> None:
    """Print the table on stderr, so that stdout holds the text alone."""
    values = stats_dict(engine)
    rows = [
        ("model", f"{values['model']}, {values['dtype']} on {values['device']}"),
        ("computed by", engine.runner.description),
        ("load time", f"{values['load_time_s']:.2f} s"),
        ("steps", f"{values['num_steps']} in {values['step_time_s']:.2f} s"),
        ("prompt tokens computed", f"{values['prefill_tokens']}"),
        (
            "generated tokens",
            f"{values['generated_tokens']} ({values['output_tokens_per_s']:.1f} tokens/s)",
        ),
        ("device busy", f"{float(values['device_busy_share']):.1%} of the time in steps"),
        ("preemptions", f"{values['num_preemptions']}"),
        (
            "KV blocks",
            f"{values['kv_blocks_peak']} of {values['kv_blocks']} used at the peak "
            f"({engine.runner.kv_cache_bytes / 2**30:.2f} GiB)",
        ),
    ]
    if engine.runner.host_pool is not None:
        rows += _offload_rows(values)
    print_two_columns(rows, sys.stderr)


def _offload_rows(values: dict[str, float | int | str]) -> list[tuple[str, str]]:
    modes = {k.removeprefix("steps_"): v for k, v in values.items() if k.startswith("steps_")}
    gib = {k: int(values[k]) / 2**30 for k in ("swapped_out_bytes", "swapped_in_bytes")}
    return [
        (
            "host KV blocks",
            f"{values['host_kv_blocks_peak']} of {values['host_kv_blocks']} used at the peak "
            f"({int(values['host_kv_cache_bytes']) / 2**30:.2f} GiB)",
        ),
        ("steps by mode", ", ".join(f"{mode} {count}" for mode, count in modes.items())),
        ("rows per step", ", ".join(f"{kind} {values[f'{kind}_per_step']}" for kind in ROW_KINDS)),
        ("CPU attention busy", f"{float(values['cpu_busy_share']):.1%} of the time in steps"),
        (
            "swapped",
            f"{gib['swapped_out_bytes']:.2f} GiB out, {gib['swapped_in_bytes']:.2f} GiB in",
        ),
        ("predicted / measured", f"{values['predicted_over_measured']} of the time in steps"),
    ]


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
