"""Which rotating rows the device attends to itself, and what that is predicted to take."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.cost_model import (
    CostModel,
    SubBatchLoad,
    balanced_direct_share,
    predict,
    rotating_attention_s,
)
from engine.direct_rows import MAX_DIRECT_BLOCKS, DirectChoice, deferred_segments
from engine.errors import ConfigError
from engine.scheduling.scheduler_config import SchedulerConfig
from tests.engine.cost_tables import make_cost_model
from workloads.model_shapes import model_shape_folder
from workloads.simulation import SimulatedModel, load_hardware


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 1.0])
def test_rows_come_to_the_share_of_the_tokens_and_lie_spread(share: float) -> None:
    rng, choice = random.Random(3), DirectChoice(16)
    choice.share = share
    lengths = [rng.randrange(50, 800) for _ in range(2000)]
    taken = []
    for number, length in enumerate(lengths):
        if number % 40 == 0:
            choice.begin_segment()
        taken.append(choice.takes(length))
    direct = sum(length for length, is_direct in zip(lengths, taken, strict=True) if is_direct)
    assert direct == pytest.approx(share * sum(lengths), abs=800)
    for start in range(0, 2000, 100):
        assert sum(taken[start : start + 100]) == pytest.approx(100 * share, abs=12)


@given(lengths=st.lists(st.integers(1, 40_000), max_size=30))
def test_a_segment_has_no_more_blocks_than_there_is_room_for(lengths: list[int]) -> None:
    choice = DirectChoice(16)
    choice.share = 0.7
    choice.begin_segment()
    assert sum(-(-n // 16) for n in lengths if choice.takes(n)) <= MAX_DIRECT_BLOCKS


@pytest.mark.parametrize(
    ("num_segments", "expected"), [(1, [0]), (2, [1]), (3, [1, 2]), (4, [2, 3])]
)
def test_the_later_segments_are_left_to_the_next_step(
    num_segments: int, expected: list[int]
) -> None:
    assert list(deferred_segments(num_segments)) == expected


def h200(model: str, *, pcie_attention: bool) -> CostModel:
    spec = SimulatedModel.open(str(model_shape_folder(model))).spec
    return load_hardware("h200-16cpu").cost_model(spec, pcie_attention=pcie_attention)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b"])
def test_cpu_and_device_are_done_at_the_same_time(name: str) -> None:
    plain, shared = (h200(name, pcie_attention=wanted) for wanted in (False, True))
    assert plain.most_direct_share == 0
    assert 0.1 < shared.most_direct_share < 0.5
    alone_s, nothing_s = rotating_attention_s(plain, 80, 32_000, 0.0)
    cpu_s, direct_s = rotating_attention_s(shared, 80, 32_000, shared.most_direct_share)
    assert nothing_s == 0
    assert cpu_s == pytest.approx(direct_s, rel=0.01)
    assert cpu_s == pytest.approx((1 - shared.most_direct_share) * alone_s, rel=0.01)


def test_a_step_takes_as_long_as_whoever_takes_longest() -> None:
    model = make_cost_model(cpu_token_s=1e-5, swap_token_s=3e-5)
    load = SubBatchLoad(num_gdec=4, gdec_tokens=100, num_rotating=8, rotating_tokens=1000)
    without = predict(model, [load])
    assert without.step_s == pytest.approx(1000 * 1e-5)
    model.most_direct_share = 0.25
    shared = predict(model, [load])
    assert shared.direct_share == 0.25
    assert shared.step_s == pytest.approx(750 * 1e-5)
    assert shared.cpu_attention_s == pytest.approx((750 * 1e-5,))
    model.most_direct_share = 0.9
    shares = []
    for arriving_tokens in (0, 100, 1000):
        step = predict(model, [load], arriving_tokens=arriving_tokens)
        cpu_s, direct_s = rotating_attention_s(model, 8, 1000, step.direct_share)
        incoming_s = model.swap_s(arriving_tokens)
        if step.direct_share:  # then neither waits for the other, to within two tokens
            assert cpu_s == pytest.approx(incoming_s + direct_s, abs=8e-5)
        assert step.step_s == pytest.approx(max(cpu_s, incoming_s + direct_s), rel=0.01)
        shares.append(step.direct_share)
    assert shares[0] > shares[1] > shares[2] == 0.0


def test_the_device_attends_to_no_more_than_the_cpu_cannot_hide() -> None:
    model = make_cost_model(cpu_token_s=1e-6, swap_token_s=1e-6)
    model.most_direct_share = 0.4
    load = SubBatchLoad(num_gdec=4, gdec_tokens=100, num_rotating=8, rotating_tokens=400)
    device_s = predict(model, [replace(load, rotating_tokens=0)]).step_s
    hidden = predict(model, [load])
    assert hidden.direct_share == 0
    assert hidden.step_s == device_s > 400 * 1e-6
    longer = predict(model, [replace(load, rotating_tokens=600)])
    assert 0 < longer.direct_share < 0.4
    assert (1 - longer.direct_share) * 600 * 1e-6 == pytest.approx(device_s)
    assert device_s < longer.step_s < 1.1 * device_s
    assert predict(model, [replace(load, rotating_tokens=5000)]).direct_share == 0.4


def test_without_pcie_there_is_no_share() -> None:
    assert balanced_direct_share(make_cost_model(swap_token_s=0.0)) == 0.0


@pytest.mark.parametrize("mode", ["gpu-only", "asymmetric"])
def test_modes_without_rotating_rows_are_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="mode must be auto or overlap with pcie_attention"):
        EngineConfig(pcie_attention=True, scheduler=SchedulerConfig(mode=mode))
