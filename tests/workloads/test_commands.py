"""What is started for a comparison: the same room for KV, whoever serves."""

import sys
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.scheduling.scheduler_config import SchedulerConfig
from workloads.drivers import commands
from workloads.drivers.commands import neo_command, vllm_command

CONFIG = EngineConfig(
    model="some/model",
    load_format="dummy",
    device_kv_blocks=54,
    max_model_len=832,
    scheduler=SchedulerConfig(mode="gpu-only", max_num_batched_tokens=832),
)


def option(command: tuple[str, ...], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


@pytest.fixture
def _with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(commands, "package_version", lambda name: "0.23.0")


def test_neo_gets_the_engines_options_and_turns_nobody_away() -> None:
    command = neo_command(CONFIG)
    assert command[:4] == (sys.executable, "-m", "neo_cli.main", "serve")
    assert option(command, "--port") == "{port}"
    assert option(command, "--device-kv-blocks") == "54"
    assert option(command, "--mode") == "gpu-only"
    assert option(command, "--host-kv-gb") is None
    assert int(option(command, "--max-queue") or 0) >= 100_000
    assert "--pcie-attention" not in command
    offloading = replace(CONFIG, scheduler=SchedulerConfig(), pcie_attention=True)
    assert "--pcie-attention" in neo_command(offloading)


@pytest.mark.usefixtures("_with_vllm")
@pytest.mark.parametrize(("system", "chunk"), [("vllm", "832"), ("vllm-256", "256")])
def test_vllm_gets_the_same_room_and_the_papers_chunks(system: str, chunk: str) -> None:
    command = vllm_command(system, CONFIG, has_tokenizer=False)
    assert command[:3] == ("/bin/vllm", "serve", "some/model")
    assert option(command, "--num-gpu-blocks-override") == "54"
    assert option(command, "--max-num-batched-tokens") == chunk
    assert option(command, "--load-format") == "dummy"
    assert "--no-enable-prefix-caching" in command
    assert "--skip-tokenizer-init" in command
    assert "--enforce-eager" not in command


@pytest.mark.usefixtures("_with_vllm")
def test_vllm_cannot_read_the_embedded_model() -> None:
    with pytest.raises(ConfigError, match="--model"):
        vllm_command("vllm", EngineConfig(), has_tokenizer=True)
