"""Sweeps: what is measured, in which order, and what an interruption leaves behind."""

import contextlib
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, NeoError
from tests.workloads.fake_openai import FakeServer, serving
from workloads.arrivals import ArrivalConfig
from workloads.bench.config import BenchConfig
from workloads.bench.summary import Load, Spread, baseline_of, gain_over, group_repeats, spread
from workloads.bench.sweep import ServerLostError, Sweep
from workloads.datasets import DatasetConfig, PromptMaker
from workloads.drivers.http_client import HttpTarget
from workloads.drivers.servers import RunningServer
from workloads.records import RequestRecord, RunRecord


@dataclass
class FakeSystem:
    """Answers every request in a second; may be interrupted at its nth run."""

    name: str
    events: list[str]
    interrupted_at: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    is_simulated: bool = False
    num_runs: int = 0
    facts: dict[str, Any] = field(default_factory=lambda: {"model_id": "m", "device_kv_blocks": 5})
    maker: Any = None

    @property
    def label(self) -> str:
        return self.name

    @contextlib.contextmanager
    def session(self, on_progress):
        self.events.append(f"start {self.name}")
        yield self
        self.events.append(f"stop {self.name}")

    def run(self, job, on_finished) -> RunRecord:
        if self.num_runs == self.interrupted_at:
            raise KeyboardInterrupt
        self.num_runs += 1
        self.events.append(f"run {self.name} {len(job.requests)}")
        on_finished(len(job.requests))
        return RunRecord(
            requests=[
                RequestRecord(
                    num_prompt_tokens=r.num_prompt_tokens,
                    wanted_output_tokens=r.num_output_tokens,
                    scheduled_s=arrival,
                    start_s=arrival,
                    token_times_s=[arrival + 1.0],
                    num_output_tokens=1,
                    end_s=arrival + 1.0,
                )
                for r, arrival in zip(job.requests, job.arrivals, strict=True)
            ],
            duration_s=2.0,
        )


def config(folder: Path, **options) -> BenchConfig:
    dataset = DatasetConfig(num_prompts=options.pop("num_prompts", 3), input_len=10, output_len=5)
    return BenchConfig(dataset=dataset, result_dir=folder, **options)


def test_systems_take_turns_within_each_repeat(tmp_path: Path) -> None:
    events: list[str] = []
    systems = [FakeSystem("a", events), FakeSystem("b", events)]
    sweep = Sweep(config(tmp_path, repeats=2, request_rates=(1.0, math.inf)), systems)
    results = list(sweep.run())
    assert len(results) == sweep.num_points == 8
    one = [
        event
        for name in "ab"
        for event in (f"start {name}", *[f"run {name} 3"] * 2, f"stop {name}")
    ]
    assert events == one * 2


def test_files_have_vllms_keys_and_the_circumstances(tmp_path: Path) -> None:
    [result] = Sweep(
        config(tmp_path, metadata={"note": "x"}, request_rates=(2.0,)), [FakeSystem("a", [])]
    ).run()
    content = json.loads(result.path.read_text())
    assert content == json.loads(json.dumps(result.figures))
    for key in (
        *("date", "label", "model_id", "num_prompts", "request_rate", "burstiness", "duration"),
        *("completed", "failed", "total_input_tokens", "total_output_tokens"),
        *("request_throughput", "output_throughput", "total_token_throughput"),
        *("mean_ttft_ms", "median_tpot_ms", "std_itl_ms", "p99_e2el_ms", "max_concurrency"),
        *("commit", "command", "machine", "options", "simulated", "device_kv_blocks", "note"),
    ):
        assert key in content, key
    assert content["machine"]["cpu"]
    assert content["request_rate"] == 2.0
    assert content["request_throughput"] == pytest.approx(1.5)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    wanted = config(tmp_path, request_rates=(1.0, 2.0, 4.0))
    first = FakeSystem("a", [], interrupted_at=2)
    with pytest.raises(KeyboardInterrupt):
        list(Sweep(wanted, [first]).run())
    assert len(list(tmp_path.glob("*.json"))) == 2
    second = FakeSystem("a", [])
    results = list(Sweep(wanted, [second]).run())
    assert [r.was_kept for r in results] == [True, True, False]
    assert second.num_runs == 1
    third = FakeSystem("a", [])
    assert all(r.was_kept for r in Sweep(wanted, [third]).run())
    assert third.events == []  # not even started


def test_a_killed_process_leaves_whole_points_that_the_next_one_keeps(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "neo_cli.main", "bench", "--simulate", "t4-g4dn.4xlarge"),
        *("--model", "llama-2-7b", "--dataset-name", "summarize", "--num-prompts", "60"),
        *("--systems", "gpu-only", "--device-kv-blocks", "54", "--request-rate"),
        *(",".join(str(rate) for rate in range(1, 9)), "--result-dir", str(tmp_path)),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    before = {path: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert 1 <= len(before) < 8
    subprocess.run(command, check=True, capture_output=True)
    after = {path: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(after) == 8
    assert before.items() <= after.items()


def test_other_options_are_other_points(tmp_path: Path) -> None:
    for wanted in (
        config(tmp_path),
        config(tmp_path, num_prompts=4),
        config(tmp_path, max_concurrency=1),
        config(tmp_path, arrivals=ArrivalConfig(burstiness=0.5)),
    ):
        assert [r.was_kept for r in Sweep(wanted, [FakeSystem("a", [])]).run()] == [False]
    changed = FakeSystem("a", [], options={"device_kv_blocks": 6})
    assert [r.was_kept for r in Sweep(config(tmp_path), [changed]).run()] == [False]
    assert len(list(tmp_path.glob("*.json"))) == 5


def test_overwriting_measures_again(tmp_path: Path) -> None:
    list(Sweep(config(tmp_path), [FakeSystem("a", [])]).run())
    again = list(Sweep(config(tmp_path, overwrite=True), [FakeSystem("a", [])]).run())
    assert [r.was_kept for r in again] == [False]


def test_a_broken_result_file_says_what_to_do(tmp_path: Path) -> None:
    [result] = Sweep(config(tmp_path), [FakeSystem("a", [])]).run()
    result.path.write_text("{")
    with pytest.raises(ConfigError, match="delete it"):
        list(Sweep(config(tmp_path), [FakeSystem("a", [])]).run())


def test_a_label_names_one_system(tmp_path: Path) -> None:
    systems = [FakeSystem("a", []), FakeSystem("b", [])]
    with pytest.raises(ConfigError, match="label"):
        Sweep(config(tmp_path, label="x"), systems)


def server_system(server: FakeServer) -> RunningServer:
    return RunningServer(
        name="server",
        target=HttpTarget(base_url=server.base_url, model=""),
        maker=PromptMaker(as_text=True),
        tokenizer=None,
    )


def test_a_server_is_asked_for_its_model_and_warmed_up(tmp_path: Path) -> None:
    with serving(FakeServer()) as server:
        wanted = config(tmp_path, num_warmups=2)
        [result] = Sweep(wanted, [server_system(server)]).run()
    assert result.figures["model_id"] == "fake-model"
    assert result.figures["completed"] == 3
    _, *warm_ups = server.bodies[:3]  # the first asks what the server understands
    counted = server.bodies[3:]
    assert result.figures["total_output_tokens"] == sum(b["max_tokens"] for b in counted)
    assert len(counted) == 3
    assert not {b["prompt"] for b in warm_ups} & {b["prompt"] for b in counted}
    assert result.figures["fields_left_out"] == []


def test_fields_that_a_server_refuses_are_left_out_and_named(tmp_path: Path) -> None:
    with serving(FakeServer(unknown_fields=("ignore_eos", "stream_options"))) as server:
        said: list[str] = []
        [result] = Sweep(config(tmp_path), [server_system(server)], said.append).run()
    assert result.figures["completed"] == 3
    assert result.figures["fields_left_out"] == ["ignore_eos", "stream_options"]
    assert "the server does not know ignore_eos and stream_options: left out" in said


def test_a_server_that_refuses_everything_says_why(tmp_path: Path) -> None:
    with (
        serving(FakeServer(unknown_fields=("prompt",))) as server,
        pytest.raises(NeoError, match=r"HTTP 422.*prompt"),
    ):
        list(Sweep(config(tmp_path), [server_system(server)]).run())


def test_a_server_that_dies_is_reported_and_its_point_measured_again(tmp_path: Path) -> None:
    wanted = config(tmp_path, num_warmups=0, num_prompts=6)
    with serving(FakeServer(dies_after=10, pause_s=0.001)) as server:
        system = server_system(server)
        with pytest.raises(ServerLostError, match="stopped answering"):
            list(Sweep(wanted, [system]).run())
        [path] = tmp_path.glob("*.json")
        content = json.loads(path.read_text())
        assert content["server_lost"]
        assert content["completed"] + content["failed"] == 6
        assert sum(content["error_counts"].values()) == content["failed"] > 0
        server.dies_after = None
        [result] = Sweep(wanted, [system]).run()
    assert not result.was_kept
    assert result.path == path
    assert result.figures["completed"] == 6


@pytest.mark.parametrize(
    "options",
    [
        {"repeats": 0},
        {"max_concurrency": 0},
        {"num_warmups": -1},
        {"request_rates": ()},
        {"request_rates": (0.0,)},
        {"output_lens": (0,)},
        {"use_trace_arrivals": True, "request_rates": (1.0,)},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BenchConfig(**options)


def result(label: str, repeat: int, rate: float, output_len: int | None = None) -> dict[str, Any]:
    return {
        "label": label,
        "repeat": repeat,
        "request_rate": "inf",
        "output_len": output_len,
        "request_throughput": rate,
    }


def test_repeats_have_a_median_and_a_range_and_gains_are_paired() -> None:
    found = [
        *(result("base", i, rate) for i, rate in enumerate([1.0, 2.0, 4.0])),
        *(result("fast", i, rate) for i, rate in enumerate([2.0, 3.0, 4.0])),
    ]
    groups = group_repeats(found)
    base, fast = groups
    assert base == Load(label="base", output_len=0, request_rate=math.inf)
    assert spread(groups[base], "request_throughput") == Spread(2.0, 1.0, 4.0)
    assert spread(groups[base], "mean_ttft_ms") is None
    assert gain_over(groups, fast, "base") == Spread(1.5, 1.0, 2.0)
    assert gain_over(groups, fast, "other") is None


def test_the_baseline_is_on_the_same_machine() -> None:
    labels = ["gpu-only@a", "gpu-only@b", "neo@b", "vllm"]
    assert baseline_of("neo@b", labels, "gpu-only") == "gpu-only@b"
    assert baseline_of("neo@c", labels, "gpu-only") is None
    assert baseline_of("neo", labels, "vllm") == "vllm"
