"""Rotating rows give the tokens that device-only steps give, whatever happens at whatever layer."""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.llm import LLM
from engine.request import Request
from engine.rotation import rotation_segments
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.step_plan import RotatingRow, ScheduledRequest, StepMode, StepPlan, SubBatch
from tests.engine.played_gpu import (
    let_device_attend,
    let_side_work_come_late,
    ring_nobody,
    use_channels,
    use_static_buffers,
)
from tests.engine.test_pipeline import NUM_OUTPUT, RandomPolicy, make_runner
from tests.engine.tiny_models import make_tiny_model
from tests.markers import DEVICES

NUM_LAYERS = 7
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[(11 * i + j) % 190 + 2 for j in range(5 + 9 * (i % 3))] for i in range(8)]


@pytest.fixture(scope="module", params=["llama-bias", "qwen3"])
def deep_folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_model(request.param, folder, num_hidden_layers=NUM_LAYERS, initializer_range=0.1)
    return folder


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 7, 32])
def test_segments_are_all_layers_once(num_layers: int) -> None:
    segments = rotation_segments(num_layers)
    assert [layer for segment in segments for layer in segment] == list(range(num_layers))
    assert len(segments) == min(4, num_layers)
    assert max(map(len, segments)) - min(map(len, segments)) <= 1


class RotatingPolicy(RandomPolicy):
    """Random steps, half of them overlap steps in which rows enter, go on or are dropped."""

    def __init__(
        self,
        runner: ModelRunner,
        seed: int,
        *,
        drop_chance: float,
        swap_chance: float,
        direct_share: float = 0.0,
    ):
        super().__init__(runner, seed, host_share=0.7, swap_chance=swap_chance)
        self.direct_share = direct_share
        self.drop_chance = drop_chance
        self.dropped_at: set[int] = set()

    def plan(self) -> StepPlan:
        for request in self.requests:
            if request.rotation_layer is not None and self.rng.random() < self.drop_chance:
                self.dropped_at.add(request.rotation_layer)
                request.rotation_layer = None
        plan = super().plan()
        for swap in plan.swaps_in:
            swap.request.rotation_layer = None
        if self.rng.random() < 0.3:
            for item in plan.scheduled:
                item.request.rotation_layer = None  # computed in one go
            return plan
        resident = [s for sub_batch in plan.sub_batches for s in sub_batch.resident]
        batch = SubBatch()
        for kind in ("gdec", "gprf", "cprf"):
            for sub_batch in plan.sub_batches:
                getattr(batch, kind).extend(getattr(sub_batch, kind))
        entering = {s.request for s in resident} - {s.request for s in batch.resident}
        for request in self.requests:
            if request.rotation_layer is not None or request in entering:
                batch.rotating.append(self.row(request))
        swaps = (plan.swaps_out, plan.swaps_in)
        return StepPlan(StepMode.OVERLAP, [batch], *swaps, direct_share=self.direct_share)

    def row(self, request: Request) -> RotatingRow:
        layer = request.rotation_layer
        share = ScheduledRequest(request, request.num_computed_tokens, 1)
        self.pool(request).grow(request.request_id, share.end)
        return RotatingRow(share, layer, samples=layer == NUM_LAYERS - 1)

    def run(self) -> list[list[int]]:
        execute = self.runner.execute

        def execute_and_rotate(plan: StepPlan):
            result = execute(plan)
            for row in plan.rotating:
                row.share.request.rotation_layer = None if row.samples else row.next_layer
            return result

        self.runner.execute = execute_and_rotate
        try:
            return super().run()
        finally:
            del self.runner.execute


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_any_rotation_gives_the_same_tokens(deep_folder: Path, device: str, share: float) -> None:
    runner = make_runner(deep_folder, device, mode="overlap", pcie_attention=share > 0)
    try:
        expected = RandomPolicy(runner, 0, host_share=0.0, swap_chance=0.0).run()
        assert all(len(tokens) == NUM_OUTPUT for tokens in expected)
        dropped_at: set[int] = set()
        for seed in range(8):
            policy = RotatingPolicy(
                runner, seed, drop_chance=0.1, swap_chance=0.03, direct_share=share
            )
            assert policy.run() == expected
            dropped_at |= policy.dropped_at
        assert dropped_at == set(range(NUM_LAYERS))
    finally:
        runner.close()


@pytest.mark.ispc
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_static_buffers_change_nothing(
    deep_folder: Path, channels: bool, share: float, monkeypatch
) -> None:
    use_static_buffers(monkeypatch)
    if channels:
        use_channels(monkeypatch)
        let_side_work_come_late(monkeypatch)
    runner = make_runner(deep_folder, "cpu", mode="overlap", pcie_attention=share > 0)
    try:
        expected = RandomPolicy(runner, 0, host_share=0.0, swap_chance=0.0).run()
        for seed in range(4):
            policy = RotatingPolicy(
                runner, seed, drop_chance=0.1, swap_chance=0.03, direct_share=share
            )
            assert policy.run() == expected
    finally:
        runner.close()


def make_llm(folder: Path, device: str, **options) -> LLM:
    options = {"mode": "overlap", "host_kv_gb": 0.02, "device_kv_blocks": 6, **options}
    options = {"load_format": "dummy", "dtype": "float32", "max_model_len": 128, **options}
    return LLM(str(folder), device=device, threads=2, **options)


def tokens_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected_on(deep_folder: Path) -> Callable[[str], list[list[int]]]:
    """Dummy weights differ between devices, so what is expected does."""

    @functools.cache
    def expected(device: str) -> list[list[int]]:
        with make_llm(deep_folder, device, mode="gpu-only", device_kv_blocks=200) as llm:
            return tokens_of(llm.generate(PROMPTS, GREEDY))

    return expected


@pytest.fixture
def expected(expected_on) -> list[list[int]]:
    return expected_on("cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": True},
        {"device_kv_blocks": 2},
        {"device_kv_blocks": 2, "async_scheduling": True},
        {"max_num_seqs": 4, "max_num_batched_tokens": 16, "async_scheduling": True},
        {"host_kv_gb": 0.003, "device_kv_blocks": 5},
        {"pcie_attention": True},
        {"pcie_attention": True, "device_kv_blocks": 2, "async_scheduling": True},
    ],
    ids=["plain", "ahead", "tiny", "tiny-ahead", "chunks", "preempted", "pcie", "pcie-ahead"],
)
def test_the_engine_gives_the_same_tokens(
    deep_folder, expected_on, device: str, options, monkeypatch
) -> None:
    let_device_attend(monkeypatch)
    expected = expected_on(device)
    with make_llm(deep_folder, device, **options) as llm:
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == expected
        stats, runner = llm.engine.stats, llm.engine.runner
        assert stats.steps_by_mode["overlap"] > NUM_LAYERS
        assert stats.rows["rotating"] > 0
        assert stats.rows["cdec"] == 0
        assert stats.num_failed_steps == 0
        assert stats.cpu_attention_time_s > 0
        assert runner.pool.num_used == runner.host_pool.num_used == 0


@pytest.mark.ispc
def test_channels_change_nothing(deep_folder, expected, monkeypatch) -> None:
    """A GPU copies a segment's rows at once, through pinned memory; so does a CPU here."""
    use_channels(monkeypatch)
    let_side_work_come_late(monkeypatch)
    let_device_attend(monkeypatch)
    tiny = {"device_kv_blocks": 2, "async_scheduling": True}
    for options in ({}, tiny, {"pcie_attention": True}, {"pcie_attention": True, **tiny}):
        with make_llm(deep_folder, "cpu", **options) as llm:
            assert tokens_of(llm.generate(PROMPTS, GREEDY)) == expected
            assert llm.engine.stats.rows["rotating"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_overdue_attention_fails_its_requests_only(
    deep_folder, expected_on, device: str, monkeypatch
) -> None:
    from engine.backends import host_attention

    expected = expected_on(device)
    monkeypatch.setattr(host_attention, "DEFAULT_TIMEOUT_S", 0.5)
    with make_llm(deep_folder, device, device_kv_blocks=2) as llm:
        assert tokens_of(llm.generate(PROMPTS[:3], GREEDY)) == expected[:3]
        with monkeypatch.context() as patch:
            ring_nobody(patch)
            [output] = llm.generate(PROMPTS[2], GREEDY)
        assert output.outputs[0].finish_reason == "error"
        assert "overdue" in str(output.outputs[0].stop_reason)
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.engine.runner.host_pool.num_used == 0


@pytest.mark.ispc
def test_a_device_error_ends_the_rotation(deep_folder, expected, monkeypatch) -> None:
    with make_llm(deep_folder, "cpu", device_kv_blocks=2) as llm:
        runner, steps = llm.engine.runner, []
        launch = type(runner._model).after_attention

        def fail_now_and_then(*args):
            steps.append(0)
            if len(steps) == 30 * NUM_LAYERS + 3:
                raise ZeroDivisionError
            return launch(*args)

        with monkeypatch.context() as patch:
            patch.setattr(type(runner._model), "after_attention", fail_now_and_then)
            with pytest.raises(ZeroDivisionError):
                llm.generate(PROMPTS, GREEDY)
        for request in list(llm.engine.scheduler.requests()):
            llm.engine.abort_request(request.request_id)
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == expected
        assert runner.host_pool.num_used == 0


@pytest.fixture(scope="module")
def shared_llm(deep_folder: Path):
    options = {"device_kv_blocks": 8, "host_kv_gb": 0.01, "max_num_batched_tokens": 24}
    with (
        make_llm(deep_folder, "cpu", max_num_seqs=6, **options) as llm,
        make_llm(deep_folder, "cpu", max_num_seqs=6, async_scheduling=True, **options) as ahead,
    ):
        yield {False: llm, True: ahead}


@pytest.mark.ispc
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**16),
    cancelled=st.dictionaries(st.integers(0, len(PROMPTS) - 1), st.integers(0, 90), max_size=4),
    ahead=st.booleans(),
)
def test_arrivals_and_cancellations_at_every_layer(
    shared_llm, expected, seed: int, cancelled: dict[int, int], ahead: bool
) -> None:
    engine, rng = shared_llm[ahead].engine, random.Random(seed)
    arrivals = sorted(rng.randrange(40) for _ in PROMPTS)
    found: dict[str, list[int]] = {}
    step = 0
    while step < max(arrivals) + 1 or engine.has_unfinished_requests():
        for number, arrival in enumerate(arrivals):
            if arrival == step:
                engine.add_request(str(number), PROMPTS[number], GREEDY)
            if cancelled.get(number) == step and engine.has_request(str(number)):
                engine.abort_request(str(number))
        for output in engine.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
        assert step < 5000
    for number in range(len(PROMPTS)):
        tokens = found.get(str(number), [])
        assert tokens == expected[number][: len(tokens)]
        assert len(tokens) == GREEDY.max_tokens or number in cancelled
    assert engine.runner.pool.num_used == engine.runner.host_pool.num_used == 0
