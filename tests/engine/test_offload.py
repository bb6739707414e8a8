"""The whole engine with a host pool: NEO's own scheduler, cost tables and modes."""

import json
from pathlib import Path

import pytest

from engine.cost_tables import load_or_profile
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.engine.played_gpu import ring_nobody
from tests.engine.tiny_models import make_tiny_model
from tests.markers import DEVICES

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
HOST_OF_10_BLOCKS = 10 * 49_152 / 2**30
LENGTHS = (5, 40, 17) * 4
PROMPTS = [[(7 * i + j) % 190 + 2 for j in range(length)] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_model("llama3.1", folder)
    return folder


@pytest.fixture(autouse=True)
def own_cost_tables(tmp_path, monkeypatch) -> None:
    """Profile afresh, but with the kernels that are built."""
    from engine import cost_tables

    monkeypatch.setattr(cost_tables, "writable_cache_dir", lambda: tmp_path)


def make_llm(folder: Path, device: str, **options) -> LLM:
    options = {"load_format": "dummy", "dtype": "float32", "max_model_len": 128, **options}
    return LLM(str(folder), device=device, **options)


def tokens_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("device", DEVICES)
def test_all_modes_give_the_same_tokens(folder: Path, device: str) -> None:
    with make_llm(folder, device, mode="gpu-only") as llm:
        expected = tokens_of(llm.generate(PROMPTS, GREEDY))
        assert llm.engine.runner.host_pool is None
    for options in (
        {"mode": "gpu-only", "device_kv_blocks": 12},
        {"mode": "asymmetric", "host_kv_gb": 0.02, "device_kv_blocks": 12},
        {"mode": "auto", "host_kv_gb": 0.02, "device_kv_blocks": 12},
        {"mode": "asymmetric", "host_kv_gb": 0.02, "device_kv_blocks": 12, "max_num_seqs": 5,
         "max_num_batched_tokens": 16},
        {"mode": "asymmetric", "host_kv_gb": HOST_OF_10_BLOCKS, "device_kv_blocks": 6},
        {"mode": "auto", "host_kv_gb": HOST_OF_10_BLOCKS, "device_kv_blocks": 6},
    ):  # fmt: skip
        with make_llm(folder, device, **options) as llm:
            assert tokens_of(llm.generate(PROMPTS, GREEDY)) == expected, options
            stats, runner = llm.engine.stats, llm.engine.runner
            if options["mode"] == "asymmetric":
                assert stats.num_failed_steps == 0
                assert stats.steps_by_mode["asymmetric"] > 0
                assert stats.rows["cdec"] > 0
            assert runner.pool.num_used == 0
            assert runner.host_pool is None or runner.host_pool.num_used == 0


@pytest.mark.parametrize("device", DEVICES)
def test_request_larger_than_the_device_pool_runs_on_the_host(folder: Path, device: str) -> None:
    with make_llm(folder, device, mode="gpu-only") as llm:
        expected = tokens_of(llm.generate(PROMPTS[1], GREEDY))
    for mode in ("auto", "asymmetric"):
        options = {"mode": mode, "host_kv_gb": 0.02, "device_kv_blocks": 2}
        with make_llm(folder, device, max_num_batched_tokens=16, max_num_seqs=4, **options) as llm:
            assert tokens_of(llm.generate(PROMPTS[1], GREEDY)) == expected
            rows = llm.engine.stats.rows
            assert rows["cdec"] + rows["rotating"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_failed_cpu_attention_fails_its_requests_only(
    folder: Path, device: str, monkeypatch
) -> None:
    from engine.backends import host_attention

    monkeypatch.setattr(host_attention, "DEFAULT_TIMEOUT_S", 0.5)
    options = {"mode": "asymmetric", "host_kv_gb": 0.02, "device_kv_blocks": 2}
    with make_llm(folder, device, **options) as llm:
        expected = tokens_of(llm.generate(PROMPTS[:2], GREEDY))
        with monkeypatch.context() as patch:
            ring_nobody(patch)
            outputs = llm.generate(PROMPTS[1], GREEDY)
        assert outputs[0].outputs[0].finish_reason == "error"
        assert "overdue" in str(outputs[0].outputs[0].stop_reason)
        assert llm.engine.stats.num_failed_steps == 1
        assert tokens_of(llm.generate(PROMPTS[:2], GREEDY)) == expected
        assert llm.engine.runner.host_pool.num_used == 0


@pytest.mark.ispc
def test_cancelled_host_resident_request_frees_its_blocks(folder: Path) -> None:
    options = {"mode": "asymmetric", "host_kv_gb": 0.02, "device_kv_blocks": 2}
    with make_llm(folder, "cpu", **options) as llm:
        engine = llm.engine
        engine.add_request("a", PROMPTS[1], GREEDY)
        engine.add_request("b", PROMPTS[4], GREEDY)
        for _ in range(5):
            engine.step()
        assert engine.runner.host_pool.num_used > 0
        output = engine.abort_request("a")
        assert output.outputs[0].finish_reason == "abort"
        while engine.has_unfinished_requests():
            engine.step()
        assert engine.runner.host_pool.num_used == 0
        engine.runner.host_pool.check_integrity()


@pytest.mark.ispc
def test_step_log_explains_every_step(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    options = {"mode": "asymmetric", "host_kv_gb": 0.02, "device_kv_blocks": 12}
    with make_llm(folder, "cpu", log_steps=path, **options) as llm:
        llm.generate(PROMPTS, GREEDY)
        num_steps = llm.engine.stats.num_steps
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == num_steps
    asymmetric = [line for line in lines if line["mode"] == "asymmetric"]
    assert asymmetric
    assert all(line["predicted"]["step_s"] > 0 for line in lines)
    with_cdec = [line for line in lines if any(s["cdec"] for s in line["sub_batches"])]
    assert all(sum(line["measured"]["attention_s"]) > 0 for line in with_cdec)
    assert all(line["host_blocks"] > 0 for line in with_cdec)
    assert sum(line["swapped_out"] for line in lines) == llm.engine.stats.swapped_out_blocks


@pytest.mark.ispc
def test_cost_tables_are_kept_and_read_again(folder: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"mode": "asymmetric", "host_kv_gb": 0.02, "device_kv_blocks": 40}
    with make_llm(folder, "cpu", **options) as llm:
        [path] = (tmp_path / "cost").glob("*.json")
        first = path.read_text()
        lines: list[str] = []
        tables = load_or_profile(llm.engine.runner, lines.append)
        assert tables.to_json() == first
        assert not lines
        with monkeypatch.context() as patch:
            patch.setattr("engine.cost_tables.METHOD", 0)
            load_or_profile(llm.engine.runner, lines.append)
        assert lines, "tables of another method are not read"
        lines.clear()
        path.write_text("{")
        again = load_or_profile(llm.engine.runner, lines.append)
        assert "profiling again" in lines[0]
        assert path.read_text() == again.to_json()
        for name in ("linear", "gpu_attention", "cpu_attention", "swap", "prefill_attention"):
            points = getattr(again.tables, name).points
            assert max(seconds for _, seconds in points) > 0, name
        assert again.tables.handover_s > 0
