"""Load with clients that leave: `python -m tests.server.chaos --requests 2000` runs it at length.

Every token that a client gets is compared with what the engine says offline.
"""

import argparse
import asyncio
import json
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.engine.tiny_models import BASE, make_tiny_model
from tests.server.running_server import RunningServer

MODES = ("gpu-only", "auto", "asymmetric", "overlap")
MAX_LEN = 128
MODEL_OPTIONS = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "threads": 1}
SMALL_POOLS = ["--device-kv-blocks", 24, "--max-num-seqs", 24, "--max-num-batched-tokens", 96]
BEHAVIOURS = {"stream": 10, "whole": 5, "leave": 4, "cancel": 2, "wrong": 1}
"""How clients behave, and how often: `leave` reads some events first, `cancel` does not wait."""

CLIENTS = 48
TIE = 1e-3
"""Log-probabilities so close that the order of a sum may decide between two tokens."""


@dataclass
class Call:
    """One request, how its client behaves, and what came of it; one entry a choice in lists."""

    body: dict[str, Any]
    behaviour: str
    patience: int
    expected: list[list[int]] = field(default_factory=list)
    got: list[list[int]] = field(default_factory=list)
    outcome: str = ""


def make_calls(count: int, seed: int) -> list[Call]:
    rng = random.Random(seed)
    return [_make_call(rng) for _ in range(count)]


def _make_call(rng: random.Random) -> Call:
    prompt = [rng.randrange(2, BASE["vocab_size"]) for _ in range(rng.randint(1, 60))]
    body = {"prompt": prompt, "max_tokens": rng.randint(1, 60), "n": rng.choice([1, 1, 1, 2, 3])}
    body |= {"return_token_ids": True, "ignore_eos": rng.random() < 0.5}
    if rng.random() < 0.3:
        body |= {"temperature": 0.8, "top_k": 4, "seed": rng.getrandbits(31)}
    else:
        body |= {"temperature": 0}
    behaviour = rng.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))[0]
    body["stream"] = behaviour in ("stream", "leave")
    if behaviour == "wrong":
        body |= rng.choice([{"prompt": [9999]}, {"max_tokens": 1000}, {"top_p": 7}])
    return Call(body, behaviour, rng.randint(0, 20))


def add_expected(folder: Path, calls: list[Call]) -> None:
    """Let the offline engine say what each request gives."""
    wanted = [
        (call, call.body["prompt"], params)
        for call in calls
        if call.behaviour != "wrong"
        for params in _params(call.body)
    ]
    options = {**MODEL_OPTIONS, "max_model_len": MAX_LEN, "device_kv_blocks": 512}
    with LLM(str(folder), mode="gpu-only", **options) as llm:
        outputs = llm.generate([prompt for _, prompt, _ in wanted], [p for _, _, p in wanted])
    for (call, _, _), output in zip(wanted, outputs, strict=True):
        call.expected.append(output.outputs[0].token_ids)


def _params(body: dict[str, Any]) -> list[SamplingParams]:
    names = ("max_tokens", "ignore_eos", "temperature", "top_k", "seed")
    given = {name: body[name] for name in names if name in body}
    return [
        SamplingParams(**{**given, **({"seed": given["seed"] + at} if "seed" in given else {})})
        for at in range(body["n"])
    ]


async def run_calls(url: str, calls: list[Call]) -> None:
    """Send all requests, so many at a time; those that find the queue full come again."""
    waiting = list(reversed(calls))
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def work() -> None:
            while waiting:
                await _run_call(client, waiting.pop())

        await asyncio.gather(*[work() for _ in range(CLIENTS)])


async def _run_call(client: httpx2.AsyncClient, call: Call) -> None:
    while True:
        call.got = [[] for _ in range(call.body["n"])]
        task = asyncio.ensure_future(_attempt(client, call))
        if call.behaviour == "cancel":
            await asyncio.wait([task], timeout=call.patience / 100)
            task.cancel()
        try:
            call.outcome = await task
        except asyncio.CancelledError:
            call.outcome = "left"
        except httpx2.TransportError as error:
            call.outcome = type(error).__name__
        if call.outcome != "429":
            return
        await asyncio.sleep(0.05)


async def _attempt(client: httpx2.AsyncClient, call: Call) -> str:
    if not call.body["stream"]:
        answer = await client.post("/v1/completions", json=call.body)
        if answer.status_code == 200:
            for choice in answer.json()["choices"]:
                call.got[choice["index"]] = choice["token_ids"]
        return str(answer.status_code)
    async with client.stream("POST", "/v1/completions", json=call.body) as answer:
        if answer.status_code != 200:
            return str(answer.status_code)
        num_events = 0
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return "200"
            if line:
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return f"event {event['error']['code']}"
                [choice] = event["choices"]
                call.got[choice["index"]] += choice["token_ids"]
                num_events += 1
            if call.behaviour == "leave" and num_events > call.patience:
                return "left"
    return "cut"


def check_calls(folder: Path, calls: list[Call], allowed: set[str]) -> Counter[str]:
    """Compare every token; return how requests ended."""
    ties = []
    for call in calls:
        if call.behaviour == "wrong":
            assert call.outcome in {"400"} | allowed, call
            continue
        usual = {"200", "left"} if call.behaviour in ("leave", "cancel") else {"200"}
        assert call.outcome in usual | allowed, call
        for got, expected in zip(call.got, call.expected, strict=True):
            if got != expected[: len(got)]:
                ties.append((call, got, expected))
            elif call.outcome == "200":
                assert len(got) == len(expected), call
    if ties:
        _check_ties(folder, ties)
    return Counter(f"{call.behaviour} {call.outcome}" for call in calls)


def _check_ties(folder: Path, ties: list[tuple[Call, list[int], list[int]]]) -> None:
    """Tokens may differ from the first one on where two were equally likely, and only there."""
    options = {**MODEL_OPTIONS, "max_model_len": MAX_LEN, "device_kv_blocks": 512}
    with LLM(str(folder), mode="gpu-only", **options) as llm:
        for call, got, expected in ties:
            same = next(at for at, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b)
            prompt = call.body["prompt"] + expected[:same]
            params = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
            [output] = llm.generate([prompt], params)
            top = dict(output.outputs[0].logprobs[0].top)
            assert call.body["temperature"] == 0, call
            assert set(top) == {got[same], expected[same]}, (call, same, top)
            assert abs(top[got[same]] - top[expected[same]]) < TIE, (call, same, top)


def wait_until_idle(server: RunningServer) -> dict[str, Any]:
    """Wait for the last abort to arrive; return the gauges."""
    while True:
        gauges = server.get("/dashboard/state?since=1000000000")[1]["gauges"]
        if gauges["num_running"] + gauges["num_waiting"] == 0:
            return gauges
        time.sleep(0.05)


def server_options(folder: Path, mode: str) -> list[object]:
    options = ["--model", folder, "--port", 0, "--max-model-len", MAX_LEN, "--mode", mode]
    for name, value in MODEL_OPTIONS.items():
        options += [f"--{name.replace('_', '-')}", value]
    host = [] if mode == "gpu-only" else ["--host-kv-gb", 0.01]
    return [*options, *SMALL_POOLS, *host, "--max-queue", 24, "--shutdown-timeout", 600]


def run_chaos(folder: Path, log: Path, mode: str, count: int, *options: object) -> dict[str, Any]:
    """Run it all against a fresh server: a warm-up, the load, and SIGTERM in the middle of more."""
    allowed = {"504", "event request_timeout"} if "--request-timeout" in options else set()
    warm_up, calls, last = make_calls(count // 4, 1), make_calls(count, 2), make_calls(CLIENTS, 3)
    add_expected(folder, warm_up + calls + last)
    with RunningServer(log, *server_options(folder, mode), *options) as server:
        asyncio.run(run_calls(server.url, warm_up))
        bytes_before = server.resident_bytes()
        start = time.monotonic()
        asyncio.run(run_calls(server.url, calls))
        seconds = time.monotonic() - start
        gauges = wait_until_idle(server)
        assert gauges["num_device_used"] == gauges["num_host_used"] == 0, gauges
        grown = server.resident_bytes() - bytes_before
        facts = {
            "preemptions": server.metric("neo:num_preemptions_total"),
            "host rows": sum(
                server.metric("neo:rows_total", kind=kind) for kind in ("cdec", "rotating")
            ),
            "swapped bytes": server.metric("neo:swapped_bytes_total"),
            "refused": server.metric("neo:http_responses_total", status="429"),
        }
        asyncio.run(_run_until_sigterm(server, last))
        assert server.wait() == 0, server.log_text()
        assert "Traceback" not in server.log_text()
    outcomes = check_calls(folder, warm_up + calls, allowed)
    ends = {"503", "ConnectError", "ReadError", "RemoteProtocolError"}
    drained = check_calls(folder, [call for call in last if call.outcome], allowed | ends)
    return {
        "mode": mode,
        "seconds": round(seconds, 1),
        "grown_bytes": grown,
        "outcomes": dict(outcomes),
        "drained": dict(drained),
        **facts,
    }


async def _run_until_sigterm(server: RunningServer, calls: list[Call]) -> None:
    running = asyncio.ensure_future(run_calls(server.url, calls))
    while not any(call.got and any(call.got) for call in calls):
        await asyncio.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    await running


def main() -> None:
    """Run it at length in all modes and print what happened."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--modes", nargs="*", default=MODES)
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_tiny_model("llama3.1", folder)
        for mode in arguments.modes:
            facts = run_chaos(folder, Path(name) / "log", mode, arguments.requests, *more)
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
