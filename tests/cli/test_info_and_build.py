"""`neo info`, `neo build-kernels` when there is nothing to do, and the help."""

import json
import re

import pytest

from tests.cli.conftest import Neo


def test_info(neo: Neo) -> None:
    result = neo("info")
    assert (result.code, result.err) == (0, "")
    names = [re.split(r"  +", line)[0] for line in result.out.splitlines()]
    for name in ("CPU", "memory", "GPU", "C++ compiler", "ISPC compiler", "cache folder"):
        assert name in names


def test_info_json(neo: Neo) -> None:
    facts = json.loads(neo("info", "--json").out)
    assert facts["num_cores"] >= 1
    assert 0 < facts["memory_available_bytes"] <= facts["memory_total_bytes"]
    assert facts["device"] == ("cuda" if facts["gpus"] else "cpu")


def test_names_with_brackets_are_shown_as_they_are(neo: Neo, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path / "[red]x[" / "]"))
    assert str(tmp_path / "[red]x[" / "]") in neo("info").out


@pytest.mark.ispc
def test_kernels_are_up_to_date(neo: Neo) -> None:
    result = neo("build-kernels")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("CPU kernels are up to date: ")
    assert len(result.out.splitlines()) == 1


@pytest.mark.ispc
def test_the_self_test_passes(neo: Neo) -> None:
    result = neo("build-kernels", "--check", "--json", "--threads", 1)
    assert (result.code, result.err) == (0, "")
    assert all(case["passed"] for case in json.loads(result.out)["check"])


@pytest.mark.ispc
def test_the_benchmark_is_called_as_it_wants(neo: Neo, monkeypatch) -> None:
    """The measurement itself takes minutes; its arguments are checked against its signature."""
    from unittest.mock import create_autospec

    from cpu_kernels import bench

    monkeypatch.setattr(bench, "run_bench", create_autospec(bench.run_bench, return_value=[]))
    result = neo("build-kernels", "--bench", "--json", "--threads", 1)
    assert json.loads(result.out)["bench"] == []


def test_bad_number_of_threads(neo: Neo) -> None:
    result = neo("build-kernels", "--threads", 0)
    assert "threads must be at least 1, got 0" in result.error_line
    assert result.code == 2


@pytest.mark.parametrize("command", [[], ["generate"], ["info"], ["build-kernels"]])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(neo: Neo, command: list[str], option: str) -> None:
    result = neo(*command, option)
    assert (result.code, result.err) == (0, "")
    assert "Usage: neo" in result.out


def test_version(neo: Neo) -> None:
    assert re.fullmatch(r"neo \d+\.\d+\.\d+\n", neo("--version").out)
