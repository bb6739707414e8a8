"""The statistics of a run, as a table and as JSON."""

import sys

from engine.llm_engine import LLMEngine
from neo_cli.two_columns import print_two_columns


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
        "num_preemptions": stats.num_preemptions,
        "kv_blocks": runner.pool.num_blocks,
        "kv_blocks_peak": stats.peak_used_blocks,
        "kv_cache_bytes": runner.kv_cache_bytes,
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
        ("preemptions", f"{values['num_preemptions']}"),
        (
            "KV blocks",
            f"{values['kv_blocks_peak']} of {values['kv_blocks']} used at the peak "
            f"({engine.runner.kv_cache_bytes / 2**30:.2f} GiB)",
        ),
    ]
    print_two_columns(rows, sys.stderr)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
