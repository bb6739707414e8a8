"""The run that measures and simulates the same settings, on a model of one layer."""

import json
import time
from pathlib import Path

import pytest

from workloads.datasets import DatasetConfig
from workloads.paper_settings import NAME, SETTINGS, Run, Setting

pytestmark = pytest.mark.ispc


@pytest.fixture
def settings(tiny_folder: Path) -> dict[str, Setting]:
    setting = Setting(
        name="tiny",
        folder=tiny_folder,
        device_kv_blocks=8,
        host_kv_gb=0.01,
        max_num_batched_tokens=256,
        max_model_len=96,
        dataset=DatasetConfig(num_prompts=3, input_len=20),
        output_lens=(3, 4),
        vllm={3: 1.0},
    )
    return {"tiny": setting}


def make_run(folder: Path, settings: dict[str, Setting], seconds: float = 600.0) -> Run:
    return Run(folder / "out", folder / "work", time.monotonic() + seconds, settings)


def test_goes_on_where_it_stopped_and_compares(tmp_path: Path, settings, capsys) -> None:
    first = make_run(tmp_path, settings, seconds=0.0)
    first.measure(settings["tiny"])
    first.simulate(settings["tiny"])
    assert not first.is_complete
    path = tmp_path / "out" / f"{NAME}.json"
    points = json.loads(path.read_text())["results"]
    measured = [p for p in points if not p["simulated"]]
    assert [p["label"] for p in measured] == ["neo"]  # one point, then time was up
    assert len(points) == 1
    elsewhere = tmp_path / "elsewhere"
    second = make_run(elsewhere, settings)
    second.restore(path)
    second.measure(settings["tiny"])
    second.simulate(settings["tiny"])
    assert second.is_complete
    points = json.loads((elsewhere / "out" / f"{NAME}.json").read_text())["results"]
    assert len(points) == 2 * 2 * 3
    assert str(settings["tiny"].folder) not in json.dumps([p for p in points if p["simulated"]])
    kept = {p["date"] for p in measured} & {p["date"] for p in points}
    assert kept == {p["date"] for p in measured}
    work = tmp_path / "again" / "work"
    third = make_run(work.parent, settings)
    third.restore(elsewhere / "out" / f"{NAME}.json")
    restored = {path.stem for path in work.glob("*.json")}
    assert restored == {p["file"] for p in points if not p["simulated"]}  # the rest is made again
    second.print_table()
    out = capsys.readouterr().out
    assert out.count("tiny") == 4
    assert out.count("%") == 8


def test_measures_the_systems_and_rates_that_it_is_asked_for(tmp_path: Path, settings) -> None:
    path = tmp_path / "out"
    run = Run(
        path,
        tmp_path / "work",
        time.monotonic() + 600,
        settings,
        "t4-g4dn.4xlarge",
        (50.0,),
        ["neo"],
    )
    run.measure(settings["tiny"])
    points = json.loads((path / f"{NAME}.json").read_text())["results"]
    assert [(p["label"], p["output_len"]) for p in points] == [("neo", 3), ("neo", 4)]
    assert {p["request_rate"] for p in points} == {50.0}


def test_the_settings_are_the_papers() -> None:
    assert {n: s.device_kv_blocks * 16 for n, s in SETTINGS.items()} == {
        "llama-2-7b": 864,
        "llama-3-8b": 26_400,
    }
    for setting in SETTINGS.values():
        assert set(setting.vllm) == set(setting.output_lens or (0,))
