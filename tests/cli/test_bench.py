"""`neo bench` and `neo plot` as commands."""

import json
from pathlib import Path

import pytest

from tests.workloads.fake_openai import FakeServer, serving

T4 = ["--simulate", "t4-g4dn.4xlarge", "--model", "llama-2-7b", "--device-kv-blocks", 54]
SMALL = ["--dataset-name", "summarize", "--num-prompts", 12]


def test_simulates_prints_keeps_and_draws(neo, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    command = ["bench", *T4, *SMALL, "--request-rate", "0.5,2", "--result-dir", folder]
    result = neo(*command)
    assert result.code == 0
    assert result.out.startswith("SIMULATED: summarize, 12 requests a point")
    assert len(list(folder.glob("*.json"))) == 4
    again = neo(*command)
    assert again.out == result.out
    assert again.err.count("kept from before") == 4
    figure = tmp_path / "figure.svg"
    drawn = neo("plot", "load-latency", folder, "--out", figure, "--metric", "p99_ttft_ms")
    assert drawn.code == 0
    text = figure.read_text()
    assert "SIMULATED" in text
    assert "p99 time to first token, ms" in text


def test_json_holds_the_results(neo, tmp_path: Path) -> None:
    options = ["--systems", "neo", "--output-len", "5,10", "--metric-percentiles", "50,99"]
    limits = ["--goodput", "ttft:2000 e2el:90000", "--metadata", "who=me", "--label", "mine"]
    result = neo(
        "bench", *T4, *SMALL, *options, *limits, "--json", "--result-dir", tmp_path, "--log-steps"
    )
    first, second = json.loads(result.out)
    assert (first["output_len"], second["output_len"]) == (5, 10)
    assert first["label"] == "mine"
    assert first["who"] == "me"
    assert first["p50_ttft_ms"] == first["median_ttft_ms"]
    assert first["request_goodput"] is not None
    [log, _] = sorted(tmp_path.glob("*.steps.jsonl"))
    for kind in ("timeline", "kv"):
        assert neo("plot", kind, log, "--out", tmp_path / f"{kind}.png").code == 0


def test_all_machines_are_compared(neo, tmp_path: Path) -> None:
    result = neo(
        *("bench", "--simulate", "all", "--model", "meta-llama/Llama-3.1-8B"),
        *("--num-prompts", 10, "--output-len", 20, "--result-dir", tmp_path),
    )
    assert result.code == 0
    assert "RTX 4090, desktop" in result.out
    content = json.loads((tmp_path / "survey.json").read_text())
    assert content["simulated"] is True
    machines = {machine["machine"]: machine for machine in content["machines"]}
    assert "does not fit" in machines["T4, g4dn.4xlarge"]["problem"]
    assert machines["H200, 16 vCPU of a shared server"]["gain"] >= 0.99


def test_a_running_server_is_measured(neo, tmp_path: Path) -> None:
    with serving(FakeServer()) as server:
        result = neo(
            *("bench", "--base-url", server.base_url, "--num-prompts", 4, "--num-warmups", 0),
            *("--input-len", 10, "--output-len", 5, "--result-dir", tmp_path),
            *("--header", "Authorization=Bearer x", "--no-ignore-eos", "--max-concurrency", 2),
        )
    assert result.code == 0
    [path] = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["model_id"] == "fake-model"
    assert content["completed"] == 4
    assert server.headers[0]["Authorization"] == "Bearer x"
    assert "ignore_eos" not in server.bodies[0]
    assert server.most_open <= 2


def test_failed_requests_are_shown_and_fail_the_command(neo, tmp_path: Path) -> None:
    with serving(FakeServer(fails=lambda number: 500 if number == 2 else None)) as server:
        result = neo(
            *("bench", "--base-url", server.base_url, "--num-prompts", 3, "--num-warmups", 0),
            *("--result-dir", tmp_path),
        )
    assert result.code == 1
    assert "HTTP 500" in result.err
    assert "(1 requests)" in result.err


def test_an_unreachable_server_is_one_line(neo, tmp_path: Path) -> None:
    with serving(FakeServer()) as server:
        pass
    result = neo(
        *("bench", "--base-url", server.base_url, "--ready-check-timeout-sec", 0),
        *("--result-dir", tmp_path),
    )
    assert result.code == 1
    assert "no server answers at" in result.err.splitlines()[-1]


@pytest.mark.ispc
def test_neo_is_started_and_measured(neo, tmp_path: Path, tiny_chat: Path) -> None:
    result = neo(
        *("bench", "--systems", "gpu-only", "--model", tiny_chat, "--load-format", "dummy"),
        *("--device-kv-blocks", 64, "--threads", 1, "--num-prompts", 4, "--num-warmups", 1),
        *("--input-len", 20, "--output-len", 5, "--result-dir", tmp_path),
    )
    assert result.code == 0, result.err
    [path] = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["completed"] == 4
    assert content["device_kv_blocks"] == 64
    assert content["total_output_tokens"] >= 4 * 4
    assert content["warnings"] == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--request-rate", "fast"], "request_rate must be a list of numbers"),
        (["--request-rate", "nan"], "request_rate must be a list of numbers"),
        (["--goodput", "ttft"], "METRIC:MILLISECONDS"),
        (["--goodput", "itl:3"], "METRIC:MILLISECONDS"),
        (["--metadata", "who"], "KEY=VALUE"),
        (["--extra-body", "[1]"], "JSON object"),
        (["--extra-body", "{"], "JSON object"),
        (["--systems", "sglang"], "systems must be of"),
        (["--backend", "grpc"], "backend"),
        (["--prompt-format", "images"], "prompt_format"),
        (["--in-process", "--base-url", "http://x"], "exclude each other"),
        (["--dataset-name", "sharegpt"], "--dataset-path"),
    ],
)
def test_wrong_usage_is_one_line(neo, options, says) -> None:
    result = neo("bench", *options)
    assert result.code == 2
    assert says in result.error_line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--simulate", "abacus", "--model", "llama-2-7b"], "hardware 'abacus'"),
        (["--simulate", "h200-16cpu"], "needs --model"),
        (["--systems", "vllm"], "vLLM, which is not installed"),
        (["--base-url", "http://127.0.0.1:1", "--prompt-format", "tokens"], "--tokenizer"),
    ],
)
def test_what_cannot_be_measured_is_one_line(neo, tmp_path: Path, options, says) -> None:
    result = neo("bench", *options, "--result-dir", tmp_path)
    assert result.code == 1
    assert says in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["pie", "x", "-o", "a.svg"], 2, "kind must be one of"),
        (["throughput", "none.json", "-o", "a.svg"], 1, "cannot be read"),
        (["throughput", "none.json", "-o", "a.svg", "--metric", "x"], 2, "load-latency"),
        (["timeline", "a", "b", "-o", "a.svg"], 2, "one step log"),
    ],
)
def test_plots_that_cannot_be_drawn_are_one_line(neo, arguments, code, says) -> None:
    result = neo("plot", *arguments)
    assert result.code == code
    assert says in result.error_line
