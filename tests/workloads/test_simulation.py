"""The simulator and the machines that come with it; gains are tests of the scheduler's."""

import json
from pathlib import Path

import pytest

from engine.cost_model import AnalyticCostModel
from engine.errors import CapacityError, ConfigError
from engine.scheduling.scheduler_config import SchedulerConfig
from tests.engine.cost_tables import make_cost_model
from tests.engine.step_simulation import H200, LLAMA3_8B
from workloads.bench.config import BenchConfig
from workloads.bench.survey import survey
from workloads.bench.sweep import Sweep
from workloads.datasets import DatasetConfig, load_workload
from workloads.drivers.simulated import SimulatedSystem
from workloads.plots.reading import read_steps
from workloads.request import WorkloadRequest
from workloads.simulation import (
    SimulatedModel,
    Simulator,
    device_kv_blocks,
    hardware_names,
    host_kv_blocks,
    load_hardware,
)

LIMITS = SchedulerConfig()


def requests(*lengths: tuple[int, int]) -> list[WorkloadRequest]:
    return [
        WorkloadRequest(num_prompt_tokens=prompt, num_output_tokens=output)
        for prompt, output in lengths
    ]


def simulator(**options) -> Simulator:
    sizes = {"device_blocks": 1000, "host_blocks": 1000, **options}
    return Simulator(AnalyticCostModel(H200, LLAMA3_8B), LIMITS, **sizes)


def test_a_single_request_takes_what_the_cost_model_says() -> None:
    """One step for the prompt and the first token, then one a token."""
    model = AnalyticCostModel(H200, LLAMA3_8B)
    steps = []
    run = simulator().run(
        requests((100, 3)), [5.0], on_step=lambda plan, start, _: steps.append((start, plan))
    )
    [record] = run.records
    assert [start for start, _ in steps] == pytest.approx([5.0, *record.token_times_s[:-1]])
    layer_s = model.linear_s(100) + model.prefill_attention_s(100, 100)
    first_s = 32 * layer_s + model.fixed_step_s(1)
    assert record.ttft_s == pytest.approx(first_s)
    assert record.completed
    assert record.num_output_tokens == 3
    assert run.duration_s == record.end_s == record.token_times_s[-1]


def test_time_passes_between_arrivals() -> None:
    run = simulator().run(requests((10, 2), (10, 2)), [0.0, 100.0])
    assert run.records[1].start_s == 100.0
    assert 100.0 < run.duration_s < 100.1


def test_concurrency_is_limited() -> None:
    run = simulator().run(requests(*[(50, 5)] * 4), max_concurrency=1)
    ends = [record.end_s for record in run.records]
    firsts = [record.token_times_s[0] for record in run.records]
    assert all(end < first for end, first in zip(ends, firsts[1:], strict=False))


def test_a_request_that_fits_nowhere_fails_and_the_others_do_not() -> None:
    run = simulator(device_blocks=10, host_blocks=20).run(requests((50, 5), (400, 5), (250, 5)))
    assert [record.completed for record in run.records] == [True, False, True]
    assert "320 tokens" in (run.records[1].error or "")


def test_shares_of_time_add_up_to_the_steps() -> None:
    run = simulator().run(requests(*[(200, 10)] * 5))
    shares = run.shares
    parts = (
        shares.weights_s
        + shares.arithmetic_s
        + shares.prefill_attention_s
        + shares.gpu_attention_s
        + shares.fixed_s
    )
    assert parts == pytest.approx(shares.total_s) == pytest.approx(run.duration_s)
    assert shares.num_decodes == 45


@pytest.mark.parametrize("name", hardware_names())
def test_every_machine_is_whole_and_says_where_its_figures_come_from(name: str) -> None:
    machine = load_hardware(name)
    assert machine.spec is not None
    content = json.loads((Path("workloads/hardware") / f"{name}.json").read_text(encoding="utf-8"))
    sized = {"gpu_memory_bytes", "host_memory_bytes", *content["figures"]}
    assert set(machine.sources) == sized
    kinds = {source.partition(":")[0] for source in machine.sources.values()}
    assert kinds <= {"measured", "estimate", "published", "assumed"}


def test_common_machines_are_there() -> None:
    names = " ".join(hardware_names())
    for part in ("t4", "g5.2x", "g5.4x", "g5.8x", "g5.16x", "l4", "4090", "a100", "h100", "h200"):
        assert part in names


def test_sizes_follow_from_memory() -> None:
    model = SimulatedModel.open("meta-llama/Llama-3.1-8B-Instruct")
    assert model.config.num_layers == 32
    machine = load_hardware("a10g-g5.16xlarge")
    blocks = device_kv_blocks(machine, model, LIMITS, block_size=16, gpu_memory_utilization=0.9)
    # 0.9 x 22.5 GiB less 15 GiB of weights leave 4 to 5 GiB; a token takes 128 KiB.
    assert 30_000 < blocks * 16 < 42_000
    host = host_kv_blocks(machine, model, block_size=16, host_kv_gb=None)
    assert host == 192 * 2**30 // (128 * 1024 * 16)
    assert host_kv_blocks(machine, model, block_size=16, host_kv_gb=1.0) == 2**30 // 2**21
    with pytest.raises(CapacityError, match="does not fit"):
        device_kv_blocks(
            load_hardware("t4-g4dn.4xlarge"),
            model,
            LIMITS,
            block_size=16,
            gpu_memory_utilization=0.9,
        )


def test_a_machine_of_ones_own_and_a_measured_one(tmp_path: Path) -> None:
    figures = {
        "gpu_bandwidth_bytes_s": 1e12,
        "gpu_flops_s": 1e14,
        "pcie_bytes_s": 1e10,
        "cpu_bandwidth_bytes_s": 1e11,
        "cpu_attention_efficiency": 0.5,
    }
    content = {
        "name": "mine",
        "gpu": "g",
        "host": "h",
        "num_cores": 4,
        "gpu_memory_bytes": 2**34,
        "host_memory_bytes": 2**35,
        "figures": figures,
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    machine = load_hardware(str(path))
    assert machine.spec is not None
    assert machine.spec.cpu_attention_efficiency == 0.5
    tables = make_cost_model(num_layers=32)
    measured = tmp_path / "tables.json"
    measured.write_text(tables.to_json())
    machine = load_hardware(str(measured))
    assert machine.cost_model(LLAMA3_8B).linear_s(64) == tables.linear_s(64)
    with pytest.raises(ConfigError, match="--device-kv-blocks"):
        device_kv_blocks(
            machine,
            SimulatedModel.open("llama-3-8b"),
            LIMITS,
            block_size=16,
            gpu_memory_utilization=0.9,
        )
    short = tmp_path / "short.json"
    short.write_text(make_cost_model(num_layers=3).to_json())
    with pytest.raises(ConfigError, match="3 layers"):
        load_hardware(str(short)).cost_model(LLAMA3_8B)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "a10g-g5.16xlarge"),
        ("{", "cannot be read"),
        ("{}", "lacks name"),
        ("[]", "lacks name"),
        ("figures", "unusable"),
    ],
)
def test_broken_machines_say_what_is_wrong(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "machine.json"
    if content == "figures":
        good = json.loads(Path("workloads/hardware/h200-16cpu.json").read_text())
        content = json.dumps(good | {"figures": {"gpu_speed": 1}})
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        load_hardware(str(path))


def system(name: str, machine: str, folder: Path | None = None, **options) -> SimulatedSystem:
    mode = {"neo": "auto"}.get(name, name)
    return SimulatedSystem(
        name=name,
        label=f"{name}@{machine}",
        hardware=load_hardware(machine),
        model=SimulatedModel.open("llama-2-7b"),
        limits=SchedulerConfig(mode=mode, max_num_batched_tokens=832),
        block_size=16,
        device_blocks=54,
        host_kv_gb=None,
        gpu_memory_utilization=0.9,
        log_steps=folder,
        **options,
    )


def test_simulated_results_say_so_and_log_their_steps(tmp_path: Path) -> None:
    """The NEO paper's T4 setting: many times the throughput of the device alone."""
    systems = [system(name, "t4-g4dn.4xlarge", tmp_path) for name in ("gpu-only", "neo")]
    config = BenchConfig(
        dataset=DatasetConfig(dataset_name="summarize", num_prompts=60), result_dir=tmp_path
    )
    alone, free = (result.figures for result in Sweep(config, systems).run())
    assert alone["simulated"] is free["simulated"] is True
    assert free["request_throughput"] > 4 * alone["request_throughput"]
    assert alone["steps_by_mode"] == {"gpu_only": alone["num_steps"]}
    assert free["steps_by_mode"]["asymmetric"] > 0
    assert alone["host_kv_blocks"] == 0 < free["host_kv_blocks_peak"]
    logs = {path.name.split("@")[0]: read_steps(path) for path in tmp_path.glob("*.jsonl")}
    neo = next(steps for name, steps in logs.items() if name.startswith("neo"))
    assert len(neo) == free["num_steps"]
    assert all(step.simulated for step in neo)
    assert neo[-1].start_s + neo[-1].step_s == pytest.approx(free["duration"], abs=1e-5)
    assert max(step.host_blocks for step in neo) == free["host_kv_blocks_peak"]


def test_the_survey_answers_for_every_machine() -> None:
    workload = load_workload(DatasetConfig(dataset_name="summarize", num_prompts=40), None)
    machines = [system("neo", name) for name in ("t4-g4dn.4xlarge", "h200-16cpu")]
    unfit = SimulatedSystem(
        name="neo",
        label="neo",
        hardware=load_hardware("t4-g4dn.4xlarge"),
        model=SimulatedModel.open("llama-3-8b"),
        limits=LIMITS,
        block_size=16,
        device_blocks=None,
        host_kv_gb=None,
        gpu_memory_utilization=0.9,
    )
    t4, h200, none = survey([*machines, unfit], workload.requests)
    assert t4.gain is not None
    assert t4.gain > 4 > 1 < (h200.gain or 0)
    assert t4.best_mode == "asymmetric"
    assert t4.device_kv_tokens == 864
    assert t4.limited_by
    assert "does not fit" in (none.problem or "")
