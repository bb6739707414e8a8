"""How many blocks fit, and each way in which they do not."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from engine.backends import AttentionShape
from engine.config import EngineConfig
from engine.errors import CapacityError, ConfigError
from engine.memory import (
    DEFAULT_HOST_KV_BYTES,
    fit_max_model_len,
    num_cpu_device_blocks,
    num_gpu_blocks,
    num_host_blocks,
    wanted_max_model_len,
)
from engine.model_config import ModelConfig
from engine.scheduling.scheduler import SchedulerConfig
from tests.engine.test_model_config import LLAMA

GIB = 2**30
SHAPE = AttentionShape(
    num_layers=4,
    num_q_heads=8,
    num_kv_heads=8,
    head_dim=128,
    block_size=16,
    dtype=torch.bfloat16,
)
BLOCK_BYTES = 2 * 4 * 8 * 128 * 16 * 2


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch):
    """Pretend that the host has some memory available."""

    def pretend(num_bytes: int) -> None:
        memory = SimpleNamespace(available=num_bytes, total=2 * num_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    return pretend


def config(max_num_seqs: int = 256, mode: str = "auto", **options) -> EngineConfig:
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, mode=mode)
    return EngineConfig(scheduler=scheduler, **options)


def test_block_bytes() -> None:
    assert SHAPE.block_bytes == BLOCK_BYTES


def test_cpu_device_takes_little_by_default(available) -> None:
    available(100 * GIB)
    expected = DEFAULT_HOST_KV_BYTES // BLOCK_BYTES
    assert num_cpu_device_blocks(config(), SHAPE, 10**6) == expected
    assert num_cpu_device_blocks(config(device_kv_blocks=7), SHAPE, 10) == 7
    available(2 * GIB)
    assert num_cpu_device_blocks(config(), SHAPE, 10**6) == GIB // BLOCK_BYTES


def test_no_more_blocks_than_requests_can_fill(available) -> None:
    available(100 * GIB)
    assert num_cpu_device_blocks(config(max_num_seqs=3), SHAPE, 100) == 3 * 7
    assert num_host_blocks(config(max_num_seqs=3), SHAPE, 100, "cuda") == 3 * 7
    fitting = num_gpu_blocks(
        config(max_num_seqs=3), SHAPE, 100, total_bytes=80 * GIB, occupied_bytes=0
    )
    assert fitting == 3 * 7


def test_host_pool_is_there_where_it_can_be_of_use(available) -> None:
    available(100 * GIB)
    default = DEFAULT_HOST_KV_BYTES // BLOCK_BYTES
    assert num_host_blocks(config(), SHAPE, 10**6, "cuda") == default
    assert num_host_blocks(config(), SHAPE, 10**6, "cpu") == 0
    assert num_host_blocks(config(mode="asymmetric"), SHAPE, 10**6, "cpu") == default
    assert num_host_blocks(config(mode="gpu-only", host_kv_gb=1), SHAPE, 10**6, "cuda") == 0
    half = config(host_kv_gb=0.5)
    assert num_host_blocks(half, SHAPE, 10, "cpu") == GIB // 2 // BLOCK_BYTES
    with pytest.raises(CapacityError, match="less than one KV block"):
        num_host_blocks(config(host_kv_gb=1e-6), SHAPE, 10, "cuda")


def test_host_memory_does_not_suffice(available) -> None:
    available(8 * GIB)
    message = r"needs 9\.0 GiB .* 8\.0 GiB are available; lower --"
    with pytest.raises(CapacityError, match=message + "host-kv-gb"):
        num_host_blocks(config(host_kv_gb=9), SHAPE, 10, "cuda")
    with pytest.raises(CapacityError, match=message + "device-kv-blocks"):
        num_cpu_device_blocks(config(device_kv_blocks=9 * GIB // BLOCK_BYTES), SHAPE, 10)


def test_gpu_budget() -> None:
    def fitting(**options) -> int:
        return num_gpu_blocks(
            config(**options), SHAPE, 10**6, total_bytes=80 * GIB, occupied_bytes=20 * GIB
        )

    assert fitting() == 52 * GIB // BLOCK_BYTES
    assert fitting(gpu_memory_utilization=0.5) == 20 * GIB // BLOCK_BYTES
    assert fitting(device_kv_blocks=5) == 5


@pytest.mark.parametrize(
    ("options", "occupied", "message"),
    [
        ({}, 73 * GIB, "room for 0 KV blocks, 1 are needed: 73.0 of 80.0 GiB"),
        ({"device_kv_blocks": 10**9}, 0, "1000000000 are needed.*--gpu-memory-utilization is 0.9"),
    ],
)
def test_gpu_memory_does_not_suffice(options, occupied: int, message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        num_gpu_blocks(config(**options), SHAPE, 10, total_bytes=80 * GIB, occupied_bytes=occupied)


def test_longest_request() -> None:
    assert fit_max_model_len(config(), 100, 160) == 100
    assert fit_max_model_len(config(), 1000, 160) == 160
    assert fit_max_model_len(config(max_model_len=160), 160, 160) == 160
    with pytest.raises(CapacityError, match="max_model_len 161 does not fit the KV cache of 160"):
        fit_max_model_len(config(max_model_len=161), 161, 160)
    with pytest.raises(ConfigError, match="holds 1 tokens; a request needs 2"):
        fit_max_model_len(config(), 10, 1)


def test_context_of_model_and_option() -> None:
    model = ModelConfig.from_hf(LLAMA)
    assert wanted_max_model_len(config(), model) == 64
    assert wanted_max_model_len(config(max_model_len=20), model) == 20
    with pytest.raises(ConfigError, match="must be at most 64"):
        wanted_max_model_len(config(max_model_len=65), model)
