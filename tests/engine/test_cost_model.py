"""Predictions: the pipeline's recurrence, the analytic figures, and what a step is made of."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cost_model import (
    AnalyticCostModel,
    HardwareSpec,
    StageTimes,
    SubBatchLoad,
    pipeline_s,
    predict,
)
from engine.errors import ConfigError
from engine.graph_limits import MAX_GRAPH_TOKENS
from engine.scheduling.dealing import dealt_loads, hidden_windows, prefix_sums
from tests.engine.cost_tables import COST_MODELS, make_cost_model
from tests.engine.step_simulation import H200, LLAMA3_8B, T4

PARTS = st.integers(0, 50).map(float)
STAGES = st.lists(
    st.builds(StageTimes, st.integers(1, 50).map(float), PARTS, PARTS, PARTS),
    min_size=1,
    max_size=2,
)


def walk(stages, num_layers) -> tuple[float, float]:
    """Every ring and every answer of every layer, nothing skipped."""
    events, device, host, exposed = {}, 0.0, 0.0, 0.0
    for layer in range(num_layers + 1):
        for j, stage in enumerate(stages):
            answer = events.get((layer - 1, j), 0.0)
            exposed += max(0.0, answer - device)
            device = max(device, answer)
            if layer == num_layers:
                continue
            device += stage.linear_s
            if stage.cpu_attention_s:
                device += stage.handover_s
                host = max(host, device) + stage.cpu_attention_s
                events[layer, j] = host
            device += stage.gpu_attention_s
    return device, exposed


@given(stages=STAGES, num_layers=st.integers(1, 60))
def test_the_recurrence_is_exact(stages, num_layers) -> None:
    assert pipeline_s(stages, num_layers) == pytest.approx(walk(stages, num_layers))


@given(stages=STAGES, num_layers=st.integers(1, 60))
def test_the_step_is_the_devices_work_and_the_exposed_wait(stages, num_layers) -> None:
    total, exposed = pipeline_s(stages, num_layers)
    handovers = sum(s.handover_s for s in stages if s.cpu_attention_s)
    work = num_layers * (sum(s.linear_s + s.gpu_attention_s for s in stages) + handovers)
    assert total == pytest.approx(work + exposed)
    assert total >= num_layers * sum(s.cpu_attention_s for s in stages)


@given(
    linear=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    gpu_attention=st.integers(0, 50),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_attention_that_fits_the_papers_windows_is_hidden(linear, gpu_attention, shares) -> None:
    """`T_cattn[1] <= T_linear[0]`, `T_cattn[0] <= T_linear[1] + T_gattn[0]`."""
    num_layers = 40
    stages = [
        StageTimes(linear[0], gpu_attention, shares[0] * (linear[1] + gpu_attention)),
        StageTimes(linear[1], 0.0, shares[1] * linear[0]),
    ]
    _, exposed = pipeline_s(stages, num_layers)
    last_answers = sum(s.cpu_attention_s for s in stages)  # nothing is left to hide those behind
    assert exposed <= last_answers + 1e-9


def test_one_sub_batch_hides_behind_its_own_attention_only() -> None:
    total, exposed = pipeline_s([StageTimes(10.0, 4.0, 5.0, 1.0)], 10)
    assert total == pytest.approx(160.0)
    assert exposed == pytest.approx(10.0)


@given(model=COST_MODELS, row_tokens=st.lists(st.integers(1, 200), max_size=30), data=st.data())
def test_dealing_deals_each_row_once_and_windows_hide_what_they_say(
    model, row_tokens, data
) -> None:
    base = SubBatchLoad(num_gdec=3, gdec_tokens=100, num_prefill_tokens=7)
    prefix = prefix_sums(row_tokens)
    windows = hidden_windows(model, base, prefix)
    num_rows = data.draw(st.integers(0, len(row_tokens)))
    deal = windows.deal(num_rows)
    dealt = sorted([*deal.first, *deal.second[0], *deal.second[1]])
    assert dealt == list(range(num_rows))
    loads = dealt_loads(base, prefix, deal)
    assert sum(load.cdec_tokens for load in loads) == sum(row_tokens[:num_rows])
    if num_rows <= windows.num_hidden:
        prediction = predict(model, loads)
        last_s = sum(prediction.cpu_attention_s) / model.num_layers
        assert prediction.exposed_cpu_s <= last_s * (1 + 1e-9) + 1e-15


def test_without_rows_in_the_second_sub_batch_it_hides_nothing() -> None:
    """One row a little too long for the first sub-batch's linear layers."""
    model = make_cost_model(cpu_token_s=1e-6)
    base = SubBatchLoad(num_gdec=3, gdec_tokens=100, num_prefill_tokens=7)
    just_too_long = int(model.linear_s(base.num_rows) / 1e-6) + 2
    assert hidden_windows(model, base, prefix_sums([just_too_long])).num_hidden == 0


def test_a_step_is_the_sum_of_its_parts() -> None:
    model = make_cost_model(num_layers=3)
    load = SubBatchLoad(num_gdec=2, gdec_tokens=1000, num_prefill_tokens=98)
    prediction = predict(model, [load], swap_tokens=500, prefill_weight=0.5)
    assert prediction.linear_s == (pytest.approx(3e-4),)
    assert prediction.gpu_attention_s == (pytest.approx(3 * 1.01e-4),)
    assert prediction.swap_s == pytest.approx(5e-4)
    assert prediction.exposed_cpu_s == prediction.handover_s == 0
    assert prediction.step_s == pytest.approx(3e-4 + 3.03e-4 + 5e-4 + 1e-4)
    assert prediction.tokens_per_s == pytest.approx((2 + 49) / prediction.step_s)


def test_copies_of_prompts_hide_behind_the_layers_unless_they_are_longer() -> None:
    model = make_cost_model(num_layers=3)
    load = SubBatchLoad(num_prefill_tokens=100, copy_out_tokens=100)
    hidden = predict(model, [load])
    assert hidden.step_s == pytest.approx(4e-4)
    exposed = predict(model, [replace(load, copy_out_tokens=900)])
    assert exposed.prompt_copy_s > model.swap_s(900)
    assert exposed.step_s == pytest.approx(exposed.prompt_copy_s + 1e-4)
    again = predict(model, [replace(load, copy_in_tokens=200)])
    assert again.step_s == pytest.approx(hidden.step_s)
    fetched = predict(model, [replace(load, copy_in_tokens=900)])
    assert fetched.step_s == pytest.approx(model.swap_s(900) + 1e-4)


def test_copies_of_prompts_lengthen_steps_of_a_rotation() -> None:
    model = make_cost_model(num_layers=16)
    load = SubBatchLoad(num_prefill_tokens=500, num_rotating=4, rotating_tokens=40)
    plain, copies = (predict(model, [replace(load, copy_out_tokens=n)]) for n in (0, 500))
    longer_s = copies.step_s - plain.step_s
    assert 0 < longer_s < 0.1 * copies.prompt_copy_s


def test_moves_hide_behind_all_but_the_first_layers_except_in_graphs() -> None:
    model = make_cost_model(num_layers=16)
    eager = SubBatchLoad(num_gdec=2, gdec_tokens=1000, num_prefill_tokens=MAX_GRAPH_TOKENS)
    moved_s = predict(model, [eager], swap_tokens=500).step_s - predict(model, [eager]).step_s
    assert moved_s == pytest.approx(model.swap_s(500) / 4)
    graph = SubBatchLoad(num_gdec=2, gdec_tokens=1000, num_prefill_tokens=98)
    moved_s = predict(model, [graph], swap_tokens=500).step_s - predict(model, [graph]).step_s
    assert moved_s == pytest.approx(model.swap_s(500))


def test_arrivals_nearly_hide_behind_the_step_unless_they_are_longer() -> None:
    model = make_cost_model(num_layers=3)
    load = SubBatchLoad(num_gdec=2, gdec_tokens=1000)
    alone = predict(model, [load])
    hidden = predict(model, [load], arriving_tokens=500)
    assert alone.step_s < hidden.step_s < alone.step_s + 0.2 * hidden.arriving_s
    longer = predict(model, [load], arriving_tokens=1500)
    assert longer.step_s == pytest.approx(longer.arriving_s + alone.fixed_s)
    assert longer.swap_s == 0
    assert longer.moves_kv


def test_a_rotation_hides_behind_the_whole_step() -> None:
    model = make_cost_model(num_layers=3, cpu_token_s=1e-6, handover_s=1e-6)
    base = SubBatchLoad(num_gdec=2, gdec_tokens=1000)
    alone_s = predict(model, [base]).step_s
    hidden = predict(model, [replace(base, num_rotating=8, rotating_tokens=100)])
    assert hidden.exposed_cpu_s == 0
    assert hidden.cpu_attention_s == (pytest.approx(1e-4),)
    assert hidden.step_s == pytest.approx(alone_s + 3e-6, rel=0.02)
    assert hidden.tokens_per_s == pytest.approx((2 + 8 / 4) / hidden.step_s)
    longer = predict(model, [replace(base, num_rotating=8, rotating_tokens=5000)])
    assert longer.step_s == pytest.approx(5e-3)
    assert longer.exposed_cpu_s == pytest.approx(5e-3 - hidden.step_s)


def test_layers_without_rotating_rows_hand_nothing_over_except_in_graphs() -> None:
    model = make_cost_model(num_layers=9)
    few = SubBatchLoad(num_rotating=2, rotating_tokens=2)
    many = SubBatchLoad(num_rotating=10, rotating_tokens=10)
    assert predict(model, [few]).handover_s == predict(model, [many]).handover_s
    few, many = (replace(load, num_prefill_tokens=MAX_GRAPH_TOKENS + 1) for load in (few, many))
    full = predict(model, [many]).handover_s
    assert predict(model, [few]).handover_s == pytest.approx(full / 5)
    assert full == pytest.approx(9 * model.handover_s(rotating=True))


def test_an_empty_step_costs_what_is_fixed() -> None:
    assert predict(make_cost_model(), [SubBatchLoad()]).step_s == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("num_rows", "measured_us"), [(1, 115), (64, 123), (256, 170), (1024, 556), (4096, 2505)]
)
def test_the_analytic_model_is_near_what_an_h200_measured(num_rows, measured_us) -> None:
    """Llama-3-8B's linear layers, in a CUDA graph with cold weights; other kernels left out."""
    model = AnalyticCostModel(replace(H200, layer_overhead_s=0.0), LLAMA3_8B)
    assert model.linear_s(num_rows) == pytest.approx(measured_us * 1e-6, rel=0.15)


def test_the_analytic_decode_step_is_near_what_an_h200_measured() -> None:
    """24 requests of 1,100 tokens took 5.5 ms in one CUDA graph, 6.0 ms with a whole engine."""
    model = AnalyticCostModel(H200, LLAMA3_8B)
    step = predict(model, [SubBatchLoad(num_gdec=24, gdec_tokens=24 * 1100)])
    assert 5.5e-3 < step.step_s < 6.3e-3
    assert 32 * model.cpu_attention_s(1, 1000) == pytest.approx(131_072_000 / 125e9, rel=0.01)


def test_the_analytic_parts_grow_with_their_loads() -> None:
    model = AnalyticCostModel(T4, LLAMA3_8B)
    assert model.linear_s(1) < model.linear_s(500) < model.linear_s(501)
    assert model.prefill_attention_s(100, 100) < model.prefill_attention_s(100, 5000)
    assert model.gpu_attention_s(1, 100) < model.gpu_attention_s(1, 10_000)
    assert model.gpu_attention_s(0, 0) == model.cpu_attention_s(0, 0) == model.swap_s(0) == 0
    assert model.swap_s(100) < model.swap_s(200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_flops_s": 0}, "gpu_flops_s must be positive, got 0"),
        ({"handover_s": -1}, "handover_s must be positive, got -1"),
        ({"cpu_attention_efficiency": 1.1}, "efficiency must be positive and at most 1, got 1.1"),
    ],
)
def test_hardware_figures_are_checked(options, message) -> None:
    figures = {
        "gpu_bandwidth_bytes_s": 1e12,
        "gpu_flops_s": 1e14,
        "pcie_bytes_s": 1e10,
        "cpu_bandwidth_bytes_s": 1e11,
    }
    with pytest.raises(ConfigError, match=message):
        HardwareSpec(**(figures | options))
