"""What the server tells of itself: metrics, dashboard, log; and how clients that leave show."""

import asyncio
import json
import time

import openai
import pytest

from tests.server.conftest import PROMPT

pytestmark = [pytest.mark.ispc, pytest.mark.slow]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(client, model, smollm2_server, stream) -> None:
    """The engine stops within a step, long before the tokens that were asked for."""
    metric = smollm2_server.metric
    generated = metric("neo:generation_tokens_total")
    aborted = metric("neo:request_success_total", finished_reason="abort")

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{smollm2_server.url}/v1", api_key="x") as own:
            options = {"model": model, "prompt": PROMPT, "max_tokens": 1000}
            call = own.completions.create(**options, stream=stream, extra_body={"ignore_eos": True})
            if stream:
                async with await call as chunks:
                    await anext(chunks)
            else:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(call, 1.0)

    asyncio.run(leave())
    while metric("neo:request_success_total", finished_reason="abort") == aborted:
        time.sleep(0.05)
    assert metric("neo:num_requests_running") == metric("neo:kv_cache_usage_perc") == 0
    assert metric("neo:generation_tokens_total") < generated + 500


def test_metrics_have_vllm_s_names_and_add_up(client, model, smollm2_server) -> None:
    before = smollm2_server.metric("neo:generation_tokens_total", model_name=model, engine="0")
    client.completions.create(model=model, prompt=PROMPT, max_tokens=5, temperature=0)
    metric = smollm2_server.metric
    assert metric("neo:generation_tokens_total") == before + 5
    finished = metric("neo:request_success_total")
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert metric(f"neo:{name}_count") >= 1
        assert metric(f"neo:{name}_bucket", le="+Inf") == metric(f"neo:{name}_count")
    assert metric("neo:e2e_request_latency_seconds_count") == finished
    assert metric("neo:request_generation_tokens_sum") == metric("neo:generation_tokens_total")
    assert metric("neo:steps_total", mode="gpu_only") > 0
    assert metric("neo:http_responses_total", route="/v1/completions", status="200") > 0


def test_the_dashboard_hears_of_every_step_once(client, model, smollm2_server) -> None:
    _, state = smollm2_server.get("/dashboard/state")
    last = state["steps"][-1]["number"]
    client.completions.create(model=model, prompt=PROMPT, max_tokens=5, temperature=0)
    _, state = smollm2_server.get(f"/dashboard/state?since={last}")
    assert [step["number"] for step in state["steps"]] == list(range(last + 1, last + 6))
    assert sum(rows["gprf"] for rows in state["steps"][0]["rows"]) == 7
    assert all(rows["gdec"] == 1 for step in state["steps"][1:] for rows in step["rows"])
    starts = [step["start_s"] for step in state["steps"]]
    assert starts == sorted(starts)
    assert all(step["duration_s"] > 0 for step in state["steps"])
    assert state["gauges"]["num_device_used"] == 0
    status, page = smollm2_server.get("/")
    assert status == 200
    assert "<title>NEO</title>" in page


def test_the_answer_s_id_is_the_client_s_request_id(client, model, smollm2_server) -> None:
    raw = client.completions.with_raw_response.create(
        model=model, prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().id == "cmpl-mine-1"
    assert "request_id=mine-1" in smollm2_server.log_text()
    assert PROMPT not in smollm2_server.log_text()
    raw = client.completions.with_raw_response.create(
        model=model, prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "a b"}
    )
    assert len(raw.headers["x-request-id"]) == 32
    assert json.loads(raw.text)["id"].endswith(raw.headers["x-request-id"])
