"""A request that the device's pool cannot hold is measured as it is served."""

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import RequestError
from engine.llm_engine import LLMEngine
from engine.scheduling.scheduler_config import SchedulerConfig
from workloads.long_request import measure_long_request

pytestmark = pytest.mark.ispc


def test_a_request_longer_than_the_pool_is_served_by_the_host(tiny_folder: Path) -> None:
    config = EngineConfig(
        model=str(tiny_folder),
        load_format="dummy",
        device="cpu",
        device_kv_blocks=3,
        host_kv_gb=0.05,
        threads=1,
        max_model_len=320,
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
    )
    engine = LLMEngine(config)
    try:
        found = measure_long_request(engine, 300, 6)
        assert found.num_output_tokens == 6
        assert found.first_token_s > 0
        assert 0 < found.cpu_attention_ms <= found.token_ms
        assert found.attention_share == found.cpu_attention_ms / found.token_ms
        rows = engine.stats.rows
        assert rows["cprf"] == 300
        assert rows["cdec"] + rows["rotating"] >= 5
        assert engine.runner.pool.num_used == 0
        with pytest.raises(RequestError, match="320"):
            measure_long_request(engine, 400, 6)
    finally:
        engine.close()
