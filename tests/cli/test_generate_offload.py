"""`neo generate` with a host pool: modes, statistics, the step log, failing CPU attention."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.ispc


@pytest.fixture
def engine_options(tiny_chat: Path, tmp_path: Path, monkeypatch) -> list[object]:
    from engine import cost_tables

    monkeypatch.setattr(cost_tables, "writable_cache_dir", lambda: tmp_path)
    model = ["--model", tiny_chat, "--load-format", "dummy", "--threads", 1]
    return [*model, "--host-kv-gb", 0.02, "--max-model-len", 64, "--device-kv-blocks", 6]


@pytest.fixture
def options(engine_options) -> list[object]:
    return [*engine_options, "--raw", "-t", 0, "-n", 12, "--ignore-eos"]


def test_modes_print_the_same_and_stats_say_what_ran(neo, options, tmp_path: Path) -> None:
    prompts = ["one two three", "four five six", "seven eight nine"]
    log = tmp_path / "steps.jsonl"
    texts = {}
    for mode in ("gpu-only", "auto", "asymmetric", "overlap"):
        extra = ["--mode", mode, "--json", "--stats", "--log-steps", str(log)]
        result = neo("generate", *options, *extra, *prompts)
        assert result.code == 0, result.err
        *outputs, stats = [json.loads(line) for line in result.out.splitlines()]
        texts[mode] = [output["token_ids"] for output in outputs]
        assert len(log.read_text().splitlines()) == stats["stats"]["num_steps"]
        assert ("host_kv_blocks" in stats["stats"]) == (mode != "gpu-only")
    assert all(tokens == texts["gpu-only"] for tokens in texts.values())
    table = neo("generate", *options, "--mode", "asymmetric", "--stats", *prompts).err
    for name in ("steps by mode", "rows per step", "CPU attention busy", "predicted / measured"):
        assert name in table


def test_failed_cpu_attention_is_one_line_and_exit_1(neo, options, monkeypatch) -> None:
    from engine.backends import doorbells, host_attention

    monkeypatch.setattr(host_attention, "DEFAULT_TIMEOUT_S", 0.5)
    options[options.index("--device-kv-blocks") + 1] = 1
    assert neo("generate", *options, "--mode", "asymmetric", "x").code == 0  # profiles
    monkeypatch.setattr(doorbells.HostDoorbells, "ring", lambda *args: None)
    result = neo("generate", *options, "--mode", "asymmetric", "one two three four five " * 3)
    assert result.code == 1
    assert "neo: error: prompt 1: CPU attention failed: overdue" in result.err
    assert "Traceback" not in result.err


def test_wrong_options_are_usage_errors(neo, options) -> None:
    for wrong, message in (
        (["--mode", "fast"], "mode must be one of auto, gpu-only, asymmetric"),
        (["--tpot-limit-ms", "0"], "tpot_limit_ms must be above 0"),
        (["--log-steps", "/proc/nope/x"], "cannot write the step log"),
    ):
        result = neo("generate", *options, *wrong, "x")
        assert message in result.error_line
        assert result.code == (1 if wrong[0] == "--log-steps" else 2)


def test_profile_shows_the_tables(neo, engine_options) -> None:
    first = neo("profile", *engine_options, "--json")
    assert first.code == 0, first.err
    tables = json.loads(first.out)["tables"]
    assert tables["handover_s"] > 0
    assert len(tables["linear"]) > 2
    assert neo("profile", *engine_options, "--json").out == first.out
    assert "cpu attention" in neo("profile", *engine_options).out
