"""Steps launched before the last one is known, and decode steps from static buffers or graphs.

Neither may change a token. The CPU device computes at once, but goes through the same code.
"""

from pathlib import Path

import pytest

from engine.graph_ladders import row_ladder, token_ladder
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.engine.played_gpu import let_arrivals_come_late, use_channels, use_static_buffers
from tests.engine.tiny_models import make_tiny_model
from tests.markers import DEVICES, GPU_MARKS

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
LENGTHS = (5, 40, 17, 1) * 3
PROMPTS = [[(7 * i + j) % 190 + 2 for j in range(length)] for i, length in enumerate(LENGTHS)]
MIXED = [
    GREEDY,
    SamplingParams(temperature=0.8, seed=3, top_p=0.9, max_tokens=25, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(temperature=0, max_tokens=25, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=20, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=5, max_tokens=20, min_tokens=10, logit_bias={7: 5.0}),
] * 2
OPTIONS = (
    {},
    {"device_kv_blocks": 9},
    {
        "mode": "gpu-only",
        "device_kv_blocks": 9,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 16,
        "admission_lookahead": False,
    },
    {"mode": "asymmetric", "host_kv_gb": 0.02, "device_kv_blocks": 8},
    {"mode": "overlap", "host_kv_gb": 0.02, "device_kv_blocks": 8},
    {"mode": "auto", "host_kv_gb": 0.02, "device_kv_blocks": 8},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    make_tiny_model("qwen3", folder)
    return folder


@pytest.fixture(autouse=True)
def own_cost_tables(tmp_path, monkeypatch) -> None:
    from engine import cost_tables

    monkeypatch.setattr(cost_tables, "writable_cache_dir", lambda: tmp_path)


def make_llm(folder: Path, device: str, **options) -> LLM:
    defaults = {"load_format": "dummy", "dtype": "float32", "max_model_len": 128, "threads": 1}
    return LLM(str(folder), device=device, **{**defaults, **options})


def completions(llm: LLM, params) -> list[tuple]:
    """Run all prompts and return what must not depend on how steps are run."""
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    assert llm.engine.runner.pool.num_used == 0
    assert not llm.engine.scheduler.num_running
    llm.engine.runner.pool.check_integrity()
    return [
        (o.token_ids, o.finish_reason, o.logprobs and [p.token_id for p in o.logprobs])
        for o in outputs
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("params", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_going_ahead_changes_nothing(folder: Path, device: str, params) -> None:
    with make_llm(folder, device, async_scheduling=False, mode="gpu-only") as llm:
        expected = completions(llm, params)
    for options in OPTIONS:
        with make_llm(folder, device, async_scheduling=True, **options) as llm:
            assert completions(llm, params) == expected, options
            if "max_num_seqs" in options:
                assert llm.engine.stats.num_preemptions > 0


@pytest.mark.parametrize("device", DEVICES)
def test_token_that_ends_a_request_is_its_last_one(folder: Path, device: str) -> None:
    """The next step is on its way by then: what it computes for the request is dropped."""
    with make_llm(folder, device, async_scheduling=True, mode="gpu-only") as llm:
        tokens = [ids for ids, _, _ in completions(llm, GREEDY)]
        stops = [ids[4] for ids in tokens]
        params = [
            SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(s,), ignore_eos=True)
            for s in stops
        ]
        for ids, stop, (got, reason, _) in zip(
            tokens, stops, completions(llm, params), strict=True
        ):
            assert got == ids[: ids.index(stop) + 1]
            assert reason == "stop"
        generated = sum(ids.index(stop) + 1 for ids, stop in zip(tokens, stops, strict=True))
        assert llm.engine.stats.generated_tokens == len(PROMPTS) * 30 + generated


@pytest.mark.parametrize("device", DEVICES)
def test_aborting_while_a_step_is_on_its_way(folder: Path, device: str) -> None:
    with make_llm(folder, device, async_scheduling=True, mode="gpu-only") as llm:
        expected = completions(llm, GREEDY)[1][0]
        engine = llm.engine
        engine.add_request("gone", PROMPTS[0], GREEDY)
        engine.add_request("kept", PROMPTS[1], GREEDY)
        for _ in range(4):
            engine.step()
        assert engine.abort_request("gone").outputs[0].finish_reason == "abort"
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert {output.request_id for output in outputs} == {"kept"}
        assert outputs[-1].outputs[0].token_ids == expected
        assert engine.runner.pool.num_used == 0
        engine.add_request("open", PROMPTS[0], GREEDY)
        engine.step()  # closing must cope with it


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("params", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_static_buffers_change_nothing(folder: Path, monkeypatch, params, ahead: bool) -> None:
    options = {"async_scheduling": ahead, "mode": "gpu-only"}
    with make_llm(folder, "cpu", **options) as llm:
        expected = completions(llm, params)

    use_static_buffers(monkeypatch)
    use_channels(monkeypatch)
    arrived = let_arrivals_come_late(monkeypatch)
    host = {"host_kv_gb": 0.02, "device_kv_blocks": 8}
    modes = [{"mode": mode, **host} for mode in ("asymmetric", "overlap", "auto")]
    few = {"device_kv_blocks": 9, "max_num_seqs": 5, "max_num_batched_tokens": 16}
    for more in ({}, few, *modes):
        with make_llm(folder, "cpu", **{**options, **more}) as llm:
            assert completions(llm, params) == expected
            assert llm.engine.stats.graph_steps > 0
    assert arrived


@pytest.mark.parametrize("params", [pytest.param(p, marks=GPU_MARKS) for p in (GREEDY, MIXED)])
def test_graphs_change_nothing(folder: Path, params) -> None:
    results = []
    for enforce_eager in (True, False):
        for more in OPTIONS:
            options = {"enforce_eager": enforce_eager, **more}
            with make_llm(folder, "cuda", **options) as llm:
                results.append(completions(llm, params))
                assert (llm.engine.stats.graph_steps > 0) != enforce_eager
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 20, 64, 100, 256, 300, 512])
def test_ladder_of_rows(most: int) -> None:
    ladder = row_ladder(most)
    assert ladder == sorted(set(ladder))
    assert ladder[0] == 1
    assert ladder[-1] == most
    for rows in range(1, most + 1):
        fitting = next(size for size in ladder if size >= rows)
        assert fitting - rows < max(8, rows // 4 + 1)


def test_ladder_of_tokens() -> None:
    assert token_ladder(31, 8) == [31]
    assert token_ladder(16, 40) == [40]
    assert token_ladder(832, 256)[-1] == 768
    ladder = token_ladder(1024, 256)
    assert ladder == [64, 128, 192, 256, *range(384, 1025, 128)]
