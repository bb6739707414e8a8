"""Figures compared by the data in their artists, not by pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from engine.errors import ConfigError
from workloads.plots.lines import load_latency, relative_throughput
from workloads.plots.metric import axis_label
from workloads.plots.reading import read_results, read_steps
from workloads.plots.step_figures import kv_use, timeline
from workloads.plots.style import COLORS, save


def result(label: str, rate: float | str, **figures) -> dict:
    return {"label": label, "request_rate": rate, "request_throughput": 1.0, **figures}


def lines(figure) -> dict[str, tuple[list[float], list[float]]]:
    """The points of each labelled line with error bars."""
    [axes] = figure.axes
    found = {}
    for container in axes.containers:
        data = container.lines[0]
        found[container.get_label()] = (list(data.get_xdata()), list(data.get_ydata()))
    return found


def bars(figure, label: str) -> list[tuple[float, float]]:
    """Low and high end of each error bar of a line."""
    [axes] = figure.axes
    [container] = [c for c in axes.containers if c.get_label() == label]
    segments = container.lines[2][0].get_segments()
    return [tuple(segment[:, 1]) for segment in segments]


def marks(figure) -> list[str]:
    [axes] = figure.axes
    return [text.get_text() for text in axes.texts if text.get_gid() == "simulated"]


LATENCY = "p99_ttft_ms"


def test_load_latency_draws_medians_and_ranges_by_rate() -> None:
    found = [
        *(result("a", 2.0, repeat=i, p99_ttft_ms=v) for i, v in enumerate([30.0, 10.0, 20.0])),
        result("a", 1.0, p99_ttft_ms=5.0),
        result("b", 1.0, p99_ttft_ms=7.0),
        result("b", "inf", p99_ttft_ms=900.0),
        result("b", 2.0, p99_ttft_ms=None),
    ]
    figure = load_latency(found, LATENCY)
    assert lines(figure) == {"a": ([1.0, 2.0], [5.0, 20.0]), "b": ([1.0], [7.0])}
    assert bars(figure, "a") == [(5.0, 5.0), (10.0, 30.0)]
    [axes] = figure.axes
    assert axes.get_ylabel() == "p99 time to first token, ms"
    assert axes.get_xlabel() == "request rate, requests/s"
    figure.canvas.draw()
    numbers = [label.get_text() for label in axes.get_yticklabels(which="both")]
    assert "20" in numbers
    assert not any("times" in number for number in numbers)
    assert marks(figure) == []


def test_simulated_data_is_marked_all_or_partly() -> None:
    simulated = result("a", 1.0, p99_ttft_ms=5.0, simulated=True)
    measured = result("b", 1.0, p99_ttft_ms=6.0, simulated=False)
    assert marks(load_latency([simulated], LATENCY)) == ["SIMULATED"]
    assert marks(load_latency([simulated, measured], LATENCY)) == ["PARTLY SIMULATED"]


def throughput(label: str, output_len: int, *rates: float) -> list[dict]:
    return [
        result(label, "inf", output_len=output_len, repeat=i) | {"request_throughput": rate}
        for i, rate in enumerate(rates)
    ]


def test_throughput_is_relative_to_the_baseline_of_the_same_machine() -> None:
    found = [
        *throughput("gpu-only@x", 50, 1.0, 2.0),
        *throughput("neo@x", 50, 1.5, 2.0),
        *throughput("gpu-only@x", 100, 1.0),
        *throughput("neo@x", 100, 3.0),
        *throughput("gpu-only@y", 50, 10.0),
        *throughput("neo@y", 50, 11.0),
        *throughput("neo@z", 50, 1.0),
    ]
    figure = relative_throughput(found, "gpu-only")
    assert lines(figure) == {
        "neo@x": ([50.0, 100.0], [1.25, 3.0]),
        "neo@y": ([50.0], [pytest.approx(1.1)]),
    }
    assert bars(figure, "neo@x")[0] == (1.0, 1.5)
    [axes] = figure.axes
    assert any(
        line.get_label() == "gpu-only" and set(line.get_ydata()) == {1.0} for line in axes.lines
    )


def step(start: float, **fields) -> dict:
    return {
        "start_s": start,
        "mode": "gpu_only",
        "sub_batches": [{"gprf": 0, "cprf": 0}],
        "measured": {"step_s": 0.5, "device_s": 0.4},
        "device_blocks": 3,
        "host_blocks": 0,
        **fields,
    }


@pytest.fixture
def log(tmp_path: Path) -> Path:
    both = {"step_s": 0.5, "device_s": 0.45, "attention_s": [0.1, 0.2], "device_waiting_s": 0.15}
    steps = [
        step(10.0, sub_batches=[{"gprf": 9, "cprf": 0}]),
        step(10.5, mode="asymmetric", measured=both, device_blocks=5, host_blocks=7),
        step(11.0, measured=None, error="CPU attention failed"),
        step(11.5, device_blocks=1, host_blocks=2),
    ]
    path = tmp_path / "run.steps.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in steps))
    return path


def spans(figure) -> dict[str, list[tuple[float, float]]]:
    """Start and end in ms of every bar, by label."""
    [axes] = figure.axes
    found = {}
    for collection in axes.collections:
        boxes = [path.get_extents() for path in collection.get_paths()]
        found[collection.get_label()] = [(box.x0, box.x1) for box in boxes]
    return found


def test_timeline_draws_what_each_side_does_when(log: Path) -> None:
    figure = timeline(read_steps(log), 0, 10)
    found = spans(figure)
    assert np.allclose(found["gpu_only, with prompts"], [(0, 400)])
    assert np.allclose(found["asymmetric"], [(500, 800)])
    assert np.allclose(found["GPU waits for the CPU"], [(800, 950)])
    assert np.allclose(found["CPU attention"], [(500, 800)])
    assert np.allclose(found["gpu_only"], [(1500, 1900)])
    assert marks(figure) == []


def test_timeline_shows_a_window(log: Path) -> None:
    window = set(spans(timeline(read_steps(log), 1, 1)))
    assert window == {"asymmetric", "GPU waits for the CPU", "CPU attention"}
    with pytest.raises(ConfigError, match="3 steps"):
        timeline(read_steps(log), 3, 1)


def test_kv_use_has_a_line_for_each_pool_in_use(log: Path) -> None:
    figure = kv_use({"run": read_steps(log)})
    [axes] = figure.axes
    found = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }
    assert found == {
        "run, device": ([0.0, 0.5, 1.5], [3, 5, 1]),
        "run, host": ([0.0, 0.5, 1.5], [0, 7, 2]),
    }


def test_simulated_steps_show_their_predictions_and_the_mark(tmp_path: Path) -> None:
    predicted = {"step_s": 0.3, "cpu_attention_s": [0.1, 0.05]}
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(step(0.0, measured=None, simulated=True, predicted=predicted)))
    figure = timeline(read_steps(path), 0, 1)
    assert np.allclose(spans(figure)["gpu_only"], [(0, 300)])
    assert np.allclose(spans(figure)["CPU attention"], [(0, 150)])
    assert marks(figure) == ["SIMULATED"]


def test_folders_give_their_results_and_leave_out_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(result("a", 1.0)))
    (tmp_path / "b16.json").write_text(json.dumps(result("b16", 1.0)))
    (tmp_path / "b2.json").write_text(json.dumps(result("b2", 1.0)))
    (tmp_path / "together.json").write_text(json.dumps({"results": [result("t", 1.0)]}))
    (tmp_path / "other.json").write_text('{"name": "bench-gpu"}')
    vllm = {**result("", 2.0), "label": None, "backend": "vllm"}
    (tmp_path / "v.json").write_text(json.dumps(vllm))
    assert [r["label"] for r in read_results([tmp_path])] == ["a", "b2", "b16", "t", "vllm"]


@pytest.mark.parametrize(
    ("content", "says"), [("{", "cannot be read"), ('{"label": 1}', "no result of neo bench")]
)
def test_broken_results_say_so(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_results([path])


def test_a_folder_without_results_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no results"):
        read_results([tmp_path])


@pytest.mark.parametrize("content", ["", "{}\n", "nothing\n"])
def test_broken_logs_say_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"x\.jsonl"):
        read_steps(path)


def test_what_cannot_be_drawn_says_why() -> None:
    with pytest.raises(ConfigError, match="finite"):
        load_latency([result("a", "inf")], LATENCY)
    with pytest.raises(ConfigError, match="mean_ttft_ms"):
        load_latency([result("a", 1.0, mean_ttft_ms=1.0)], LATENCY)
    with pytest.raises(ConfigError, match="baseline vllm; there are a"):
        relative_throughput([result("a", "inf")], "vllm")
    with pytest.raises(ConfigError, match="same load"):
        relative_throughput([*throughput("gpu-only", 1, 1.0), *throughput("b", 2, 1.0)], "gpu-only")


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_the_same_data_gives_the_same_file(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for path in paths:
        save(load_latency([result("a", 1.0, p99_ttft_ms=5.0)], LATENCY), [path])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(ConfigError, match="must end in"):
        save(load_latency([result("a", 1.0, p99_ttft_ms=5.0)], LATENCY), [tmp_path / "a.gif"])


def test_colours_differ_for_people_who_see_no_red_or_no_green() -> None:
    """Distances after Vienot's projection of deuteranopia; 0.1 is told apart easily."""
    to_deuteranope = np.array(
        [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]
    )
    seen = [to_deuteranope @ (np.array(to_rgb(color)) ** 2.2) for color in COLORS]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(distances) > 0.1


def test_axis_labels_name_the_quantity() -> None:
    assert axis_label("mean_per_token_latency_ms") == (
        "mean end-to-end latency / output tokens, ms"
    )
    assert axis_label("request_throughput") == "request throughput"
