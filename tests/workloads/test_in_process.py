"""The engine in this process, on a model of one layer."""

import itertools
import weakref
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.scheduling.scheduler_config import SchedulerConfig
from workloads.bench.config import BenchConfig
from workloads.bench.sweep import Sweep
from workloads.bench.system import Job
from workloads.datasets import DatasetConfig
from workloads.drivers.in_process import InProcessSystem
from workloads.request import WorkloadRequest

pytestmark = pytest.mark.ispc


@pytest.fixture(scope="module")
def system(tiny_folder: Path) -> InProcessSystem:
    config = EngineConfig(
        model=str(tiny_folder),
        load_format="dummy",
        device="cpu",
        device_kv_blocks=32,
        threads=1,
        max_model_len=256,
        scheduler=SchedulerConfig(mode="gpu-only", max_num_seqs=4, max_num_batched_tokens=64),
    )
    return InProcessSystem(name="gpu-only", config=config)


def test_a_sweep_counts_tokens_and_steps(system: InProcessSystem, tmp_path: Path) -> None:
    dataset = DatasetConfig(num_prompts=5, input_len=20, output_len=6)
    config = BenchConfig(
        dataset=dataset, result_dir=tmp_path, request_rates=(50.0, float("inf")), num_warmups=1
    )
    for result in Sweep(config, [system]).run():
        figures = result.figures
        assert (figures["completed"], figures["failed"]) == (5, 0)
        assert figures["total_output_tokens"] >= 5 * 5
        assert figures["simulated"] is False
        assert figures["device_kv_blocks"] == 32
        assert figures["host_kv_blocks"] == 0
        assert figures["steps_by_mode"] == {"gpu_only": figures["num_steps"]}
        assert figures["versions"]["torch"]


def test_failures_concurrency_and_times(system: InProcessSystem) -> None:
    requests = [
        WorkloadRequest(num_prompt_tokens=n, num_output_tokens=3, prompt=[11] * n)
        for n in (5, 300, 5, 5)
    ]
    with system.session(lambda line: None) as session:
        job = Job(requests=requests, arrivals=[0.0] * 4, max_concurrency=1)
        finished: list[int] = []
        run = session.run(job, finished.append)
    assert [r.completed for r in run.requests] == [True, False, True, True]
    assert "300 tokens" in (run.requests[1].error or "")
    done = [r for r in run.requests if r.completed]
    for before, after in itertools.pairwise(done):
        assert after.start_s >= before.end_s
    assert all(len(r.token_times_s) == r.num_output_tokens == 3 for r in done)
    assert finished[-1] == 4


def test_the_engine_is_gone_when_the_session_ends(system: InProcessSystem) -> None:
    with system.session(lambda line: None) as session:
        engine = weakref.ref(session._engine)
        assert engine() is not None
    assert engine() is None
