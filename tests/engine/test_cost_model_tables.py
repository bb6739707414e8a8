"""Measured tables: interpolation, files, broken files; and their correction while steps run."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cost_model import CorrectedCostModel, SubBatchLoad, Table, TableCostModel, predict
from engine.errors import CheckpointError, ConfigError
from engine.step_plan import StepMeasurement
from tests.engine.cost_tables import KEY, make_cost_model

DECODES = [SubBatchLoad(num_gdec=4, gdec_tokens=400)]
MIXED = [SubBatchLoad(num_gdec=4, gdec_tokens=400), SubBatchLoad(num_cdec=4, cdec_tokens=2000)]


def test_tables_are_straight_between_and_beyond_their_points() -> None:
    table = Table([(1, 10), (3, 20), (4, 40)])
    assert [table(x) for x in (1, 2, 3, 3.5, 4, 5)] == [10, 15, 20, 30, 40, 50]
    assert table(0) == 5
    assert Table([(5, 1), (6, 10)])(0) == 0
    assert Table([(5, 3)])(100) == 3
    noisy = [(1, 10), (2, 20), (4, 40), (8, 80), (10, 81)]
    assert Table(noisy)(20) == pytest.approx(81 + 10 * 41 / 6)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least one point"),
        ([(1, 1), (1, 2)], "must rise"),
        ([(1, -1)], "finite and at least 0"),
        ([(1, float("nan"))], "finite and at least 0"),
    ],
)
def test_points_are_checked(points, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Table(points)


@given(num_tokens=st.integers(0, 10_000), num_rows=st.integers(1, 100))
def test_a_file_brings_back_the_same_model(num_tokens, num_rows) -> None:
    model = make_cost_model()
    again = TableCostModel.from_json(model.to_json(), source="file", key=KEY)
    assert again.key == model.key
    assert again.num_layers == model.num_layers
    assert again.linear_s(num_rows) == model.linear_s(num_rows)
    assert again.prefill_attention_s(num_rows, num_tokens + num_rows) == (
        model.prefill_attention_s(num_rows, num_tokens + num_rows)
    )
    for name in ("gpu_attention_s", "cpu_attention_s"):
        assert getattr(again, name)(num_rows, num_tokens) == (
            getattr(model, name)(num_rows, num_tokens)
        )
    assert again.handover_s() == model.handover_s()
    assert again.swap_s(num_tokens) == model.swap_s(num_tokens)
    assert again.fixed_step_s(num_rows) == model.fixed_step_s(num_rows)


def broken(change) -> str:
    content = json.loads(make_cost_model().to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cost table file is broken"),
        ("[]", "cost table file is broken"),
        ("{}", "broken .KeyError: 'version'"),
        (broken(lambda c: c.update(version=0)), "has version 0, expected 2"),
        (broken(lambda c: c["tables"].pop("swap")), "broken .KeyError: 'swap'"),
        (broken(lambda c: c["tables"].update(linear=[[2, 1], [1, 1]])), "must rise"),
        (broken(lambda c: c["tables"].update(linear=[[2]])), "broken"),
        (broken(lambda c: c["tables"].update(linear=None)), "broken"),
        (broken(lambda c: c["tables"].update(handover_s=-1)), "handover_s must be finite"),
        (broken(lambda c: c.update(num_layers=0)), "num_layers must be at least 1"),
        (broken(lambda c: c["key"].update(colour="red")), "broken .TypeError"),
    ],
)
def test_a_broken_file_says_so(text, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        TableCostModel.from_json(text, source="file")


def test_tables_of_another_machine_are_refused() -> None:
    text = make_cost_model().to_json()
    with pytest.raises(ConfigError, match="measured for gpu 'g' instead of 'other'"):
        TableCostModel.from_json(text, source="file", key=replace(KEY, gpu="other"))


def observe(model, loads, truth, steps, *, parts) -> None:
    for _ in range(steps):
        real = predict(truth, loads)
        measured = StepMeasurement(step_s=real.step_s)
        if parts:
            measured = StepMeasurement(
                step_s=real.step_s,
                linear_s=sum(real.linear_s),
                gpu_attention_s=sum(real.gpu_attention_s),
                cpu_attention_s=sum(real.cpu_attention_s),
                fixed_s=real.fixed_s,
            )
        model.observe(predict(model, loads), measured)


def test_parts_that_were_measured_correct_themselves() -> None:
    truth = make_cost_model(weights_s=3e-4, cpu_token_s=5e-7, fixed_s=1e-4)
    model = CorrectedCostModel(make_cost_model())
    observe(model, MIXED, truth, 300, parts=True)
    assert model.factors["linear"] == pytest.approx(3.0, rel=0.01)
    assert model.factors["cpu_attention"] == pytest.approx(0.5, rel=0.01)
    assert model.factors["fixed"] == pytest.approx(1.0)
    assert model.factors["swap"] == model.factors["prefill_attention"] == 1.0
    assert predict(model, MIXED).step_s == pytest.approx(predict(truth, MIXED).step_s, rel=0.01)


@pytest.mark.parametrize("loads", [DECODES, MIXED])
def test_the_whole_time_alone_corrects_the_prediction(loads) -> None:
    truth = make_cost_model(weights_s=2e-4, cpu_token_s=3e-6)
    model = CorrectedCostModel(make_cost_model())
    observe(model, loads, truth, 500, parts=False)
    assert predict(model, loads).step_s == pytest.approx(predict(truth, loads).step_s, rel=0.02)


def test_one_outlier_moves_little_and_no_factor_leaves_its_bounds() -> None:
    model = CorrectedCostModel(make_cost_model(), max_factor=4.0)
    model.observe(predict(model, DECODES), StepMeasurement(step_s=1e6, linear_s=1e6))
    assert 1.0 < model.factors["linear"] < 1.04
    for _ in range(1000):
        model.observe(predict(model, DECODES), StepMeasurement(step_s=1e6, linear_s=1e6))
    assert model.factors["linear"] == pytest.approx(4.0)
    for _ in range(1000):
        model.observe(predict(model, DECODES), StepMeasurement(step_s=1e6, linear_s=1e-9))
    assert model.factors["linear"] == pytest.approx(0.25)


def test_a_slow_host_is_forgiven_while_nobody_uses_it() -> None:
    model = CorrectedCostModel(make_cost_model())
    observe(model, MIXED, make_cost_model(cpu_token_s=1e-5), 300, parts=True)
    slow = model.factors["cpu_attention"]
    assert slow == pytest.approx(5.0)
    observe(model, DECODES, make_cost_model(), 100, parts=True)
    assert 1.0 < model.factors["cpu_attention"] < 0.8 * slow


def test_each_way_of_using_the_host_learns_for_itself() -> None:
    model = CorrectedCostModel(make_cost_model())
    rotating = [SubBatchLoad(num_gdec=2, gdec_tokens=100, num_rotating=8, rotating_tokens=2000)]
    observe(model, rotating, make_cost_model(cpu_token_s=2e-6), 300, parts=True)
    assert model.factors["rotating_attention"] == pytest.approx(2.0, rel=0.01)
    assert model.factors["cpu_attention"] == 1.0
    observe(model, MIXED, make_cost_model(cpu_token_s=3e-6), 100, parts=True)
    assert model.factors["cpu_attention"] > 2.5
    assert 1.0 < model.factors["rotating_attention"] < 1.9


def test_a_rotation_does_not_teach_the_hand_over_unless_the_device_s_time_is_known() -> None:
    """A step that was long may have ended with the CPU's attention."""
    model = CorrectedCostModel(make_cost_model(handover_s=1e-5))
    rotating = [SubBatchLoad(num_gdec=2, gdec_tokens=100, num_rotating=8, rotating_tokens=2000)]
    predicted = predict(model, rotating)
    whole = {"step_s": 2 * predicted.step_s, "cpu_attention_s": predicted.step_s}
    model.observe(predicted, StepMeasurement(**whole))
    assert model.factors["rotating_handover"] == 1.0
    model.observe(predicted, StepMeasurement(**whole, device_busy_s=predicted.step_s))
    assert model.factors["rotating_handover"] > 1.0


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_rotation_teaches_the_device_its_own_time(share: float) -> None:
    """Also where the step ends with the CPU's attention, and where it was expected to be slower."""
    model = CorrectedCostModel(make_cost_model(handover_s=1e-5))
    rotating = [SubBatchLoad(num_gdec=2, gdec_tokens=100, num_rotating=8, rotating_tokens=2000)]
    first = predict(model, rotating)
    assert first.exposed_cpu_s > 0
    busy_s = share * (first.step_s - first.exposed_cpu_s)
    for _ in range(500):
        prediction = predict(model, rotating)
        attention_s = sum(prediction.cpu_attention_s)
        step_s = max(busy_s, attention_s)
        model.observe(
            prediction,
            StepMeasurement(step_s=step_s, device_busy_s=busy_s, cpu_attention_s=attention_s),
        )
    found = predict(model, rotating)
    assert found.step_s - found.exposed_cpu_s == pytest.approx(busy_s, rel=0.03)
    assert (model.factors["linear"] > 1) == (share > 1)
    assert model.factors["long_linear"] == 1.0


def test_long_steps_say_nothing_about_decodes() -> None:
    model = CorrectedCostModel(make_cost_model())
    prompts = [SubBatchLoad(num_prefill_tokens=500, num_gdec=2, gdec_tokens=100)]
    decode_s = predict(model, DECODES).step_s
    slow_s = 1.5 * predict(model, prompts).step_s
    for _ in range(500):
        prediction = predict(model, prompts)
        model.observe(prediction, StepMeasurement(step_s=slow_s))
    assert predict(model, prompts).step_s == pytest.approx(slow_s, rel=0.02)
    assert predict(model, DECODES).step_s == decode_s


def test_prompts_beside_a_rotation_do_not_charge_the_device_alone() -> None:
    """Else a rotation would seem to pay because its own prompts are slow."""
    model = CorrectedCostModel(make_cost_model())
    alone = SubBatchLoad(num_prefill_tokens=500, num_gdec=2, gdec_tokens=100)
    rotating = replace(alone, num_rotating=8, rotating_tokens=100)
    alone_s = predict(model, [alone]).step_s
    slow_s = 1.4 * predict(model, [rotating]).step_s
    for _ in range(500):
        prediction = predict(model, [rotating])
        attention_s = sum(prediction.cpu_attention_s)
        model.observe(
            prediction,
            StepMeasurement(step_s=slow_s, device_busy_s=slow_s, cpu_attention_s=attention_s),
        )
    assert predict(model, [rotating]).step_s == pytest.approx(slow_s, rel=0.02)
    assert predict(model, [alone]).step_s == pytest.approx(alone_s)
    observe(model, DECODES, make_cost_model(), 3000, parts=True)
    assert predict(model, [rotating]).step_s < 0.75 * slow_s


@pytest.mark.parametrize("moved", [{"swap_tokens": 100}, {"arriving_tokens": 100}])
def test_a_step_that_moved_blocks_teaches_nothing_as_a_whole(moved: dict[str, int]) -> None:
    model = CorrectedCostModel(make_cost_model())
    prediction = predict(model, DECODES, **moved)
    model.observe(prediction, StepMeasurement(step_s=100.0))
    assert set(model.factors.values()) == {1.0}


@pytest.mark.parametrize(
    "options", [{"weight": 0}, {"max_step_ratio": 0.5}, {"max_factor": 0}, {"fading": 1}]
)
def test_bounds_are_checked(options) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
        CorrectedCostModel(make_cost_model(), **options)
