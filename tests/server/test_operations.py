"""Starting, draining, refusing, timing out and failing: a real server with a tiny model."""

import http.client
import json
import os
import signal
import socket
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.conftest import Serve, tiny_options
from tests.server.running_server import RunningServer

pytestmark = [pytest.mark.ispc, pytest.mark.slow]

SHORT = {"prompt": "Hello", "max_tokens": 4}
LONG = {"prompt": "Hello", "max_tokens": 450, "ignore_eos": True}
VERY_LONG = {**LONG, "n": 64, "max_tokens": 500}
"""Takes far longer than any test waits."""
SECRET = "the quick brown fox"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_until_running(server: RunningServer, count: int = 1) -> None:
    while server.metric("neo:num_requests_running") < count:
        time.sleep(0.02)


def events(body: str) -> list[str]:
    assert body.endswith("\n\n")
    lines = body.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_a_server_s_life_from_loading_to_draining(serve: Serve) -> None:
    port = free_port()
    limits = ["--max-num-seqs", 1, "--max-queue", 2, "--shutdown-timeout", 600]
    server = serve("--port", port, *limits)
    server.url = f"http://127.0.0.1:{port}"
    check_loading(server)
    server.wait_ready()
    assert server.get("/health") == (200, {"status": "ready", "problem": None})
    assert server.metric("neo:ready") == 1
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(server.post, "/v1/completions", LONG) for _ in range(3)]
        check_queue_is_full(server)
        server.process.send_signal(signal.SIGTERM)
        while server.get("/health")[1]["status"] == "ready":
            time.sleep(0.01)
        assert server.get("/health")[1]["problem"] == "the server is draining"
        status, answer = server.post("/v1/completions", SHORT)
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        for job in running:
            status, answer = job.result()
            assert (status, answer["usage"]["completion_tokens"]) == (200, 450)
    assert server.wait() == 0
    assert "draining running_requests=" in server.log_text()


def check_loading(server: RunningServer) -> None:
    """The server answers before the model is there, but takes no requests."""
    while True:
        try:
            status, health = server.get("/health")
            break
        except urllib.error.URLError:
            assert server.process.poll() is None, server.log_text()
            time.sleep(0.05)
    assert (status, health["status"]) == (503, "loading")
    status, answer = server.post("/v1/completions", SHORT)
    assert (status, answer["error"]["code"]) == (503, "unavailable")
    assert server.metric("neo:ready") == 0


def check_queue_is_full(server: RunningServer) -> None:
    """With one request running and two waiting, another one is told to come again."""
    while server.metric("neo:num_requests_waiting") < 2:
        time.sleep(0.02)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    head = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(SHORT), head)
    refused = connection.getresponse()
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert json.loads(refused.read())["error"]["code"] == "queue_full"
    connection.close()
    status, answer = server.post("/v1/completions", {**SHORT, "n": 4})  # never possible here
    assert (status, answer["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("how", ["second signal", "shutdown timeout"])
def test_what_does_not_end_in_time_is_cut_off_with_an_error(serve: Serve, how: str) -> None:
    options = ["--shutdown-timeout", 0.3] if how == "shutdown timeout" else []
    with serve(*options) as server, ThreadPoolExecutor() as pool:
        running = pool.submit(server.post, "/v1/completions", VERY_LONG)
        wait_until_running(server)
        server.process.send_signal(signal.SIGINT)
        if how == "second signal":
            while server.get("/health")[1]["status"] == "ready":
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
        status, answer = running.result()
        assert (status, answer["error"]["message"]) == (503, "the server is shutting down")
        assert server.wait() == 1
        assert "cutting off requests" in server.log_text()


def test_ctrl_c_while_loading_exits_as_every_command_does(serve: Serve) -> None:
    port = free_port()
    server = serve("--port", port)
    server.url = f"http://127.0.0.1:{port}"
    check_loading(server)
    assert server.stop(signal.SIGINT) == 130
    assert server.log_text().endswith("neo: interrupted\n")


@pytest.fixture(scope="module")
def guarded(tiny_chat_folder: Path, tmp_path_factory) -> Iterator[RunningServer]:
    """A server with names, keys and limits of all kinds."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    names = ["--served-model-name", "a", "--served-model-name", "b/c"]
    limits = ["--max-body-mb", 0.01, "--request-timeout", 2, "--log-json"]
    env = {"NEO_API_KEYS": "first-key second-key"}
    with RunningServer(log, *tiny_options(tiny_chat_folder), *names, *limits, env=env) as server:
        yield server


KEY = {"authorization": "Bearer second-key"}


def test_api_keys(guarded: RunningServer) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first-key"}):
        status, answer = guarded.post("/v1/completions", SHORT, **headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert guarded.get("/metrics", **headers)[0] == 401
    for key in ("first-key", "second-key"):
        headers = {"authorization": f"Bearer {key}"}
        assert guarded.post("/v1/completions", SHORT, **headers)[0] == 200
    assert guarded.get("/health")[0] == guarded.get("/")[0] == 200
    assert "first-key" not in guarded.log_text()


def test_requests_that_take_too_long_end_with_an_error_and_free_their_blocks(
    guarded: RunningServer,
) -> None:
    status, answer = guarded.post("/v1/completions", VERY_LONG, **KEY)
    assert (status, answer["error"]["code"]) == (504, "request_timeout")
    status, body = guarded.post("/v1/completions", {**VERY_LONG, "stream": True}, **KEY)
    *chunks, error, done = events(body)
    assert status == 200
    assert len(chunks) >= 1
    assert json.loads(error)["error"]["code"] == "request_timeout"
    assert done == "[DONE]"
    while guarded.metric("neo:num_requests_running", **KEY):
        time.sleep(0.02)
    assert guarded.metric("neo:kv_cache_usage_perc", **KEY) == 0


def test_bodies_beyond_the_limit_are_refused(guarded: RunningServer) -> None:
    assert guarded.post("/v1/completions", {**SHORT, "user": "x" * 9000}, **KEY)[0] == 200
    status, answer = guarded.post("/v1/completions", {**SHORT, "user": "x" * 11000}, **KEY)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    connection = http.client.HTTPConnection(guarded.url.removeprefix("http://"))
    pieces = (b"x" * 1000 for _ in range(11))
    headers = {"content-type": "application/json", **KEY}
    connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "body_too_large"
    connection.close()


def test_json_logs_tell_of_requests_but_not_what_they_say(guarded: RunningServer) -> None:
    chat = {"model": "b/c", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}
    headers = {"X-Request-Id": "abc", **KEY}
    status, answer = guarded.post("/v1/chat/completions", chat, **headers)
    assert (status, answer["model"], answer["id"]) == (200, "b/c", "chatcmpl-abc")
    assert guarded.post("/v1/completions", {"prompt": SECRET, "top_p": SECRET}, **KEY)[0] == 400
    lines = [json.loads(line) for line in guarded.log_text().splitlines()]
    [line] = [line for line in lines if line.get("request_id") == "abc"]
    assert line["method"] == "POST"
    assert line["path"] == "/v1/chat/completions"
    assert (line["status"], line["output_tokens"]) == (200, 3)
    assert line["prompt_tokens"] > 3
    assert SECRET not in guarded.log_text()


def test_served_model_names(guarded: RunningServer) -> None:
    assert guarded.model == "a"
    _, models = guarded.get("/v1/models", **KEY)
    assert [model["id"] for model in models["data"]] == ["a", "b/c"]
    assert guarded.get("/v1/models/b/c", **KEY)[1]["id"] == "b/c"
    assert guarded.post("/v1/completions", {**SHORT, "model": "b/c"}, **KEY)[1]["model"] == "b/c"
    assert guarded.post("/v1/completions", {**SHORT, "model": "c"}, **KEY)[0] == 404


def test_the_end_of_the_engine_fails_requests_and_the_server(serve: Serve) -> None:
    with serve() as server, ThreadPoolExecutor() as pool:
        running = pool.submit(server.post, "/v1/completions", VERY_LONG)
        streaming = pool.submit(server.post, "/v1/completions", {**VERY_LONG, "stream": True})
        wait_until_running(server, 65)
        while server.metric("neo:generation_tokens_total") < 200:
            time.sleep(0.02)
        os.kill(server.engine_pid, signal.SIGKILL)
        status, answer = running.result()
        assert (status, answer["error"]["code"]) == (500, "engine_error")
        assert "ended unexpectedly" in answer["error"]["message"]
        *_, error, done = events(streaming.result()[1])
        assert json.loads(error)["error"]["code"] == "engine_error"
        assert done == "[DONE]"
        assert server.wait() == 1
        [line] = [line for line in server.log_text().splitlines() if line.startswith("neo:")]
        assert "the engine process ended unexpectedly (killed by SIGKILL)" in line


def test_the_engine_does_not_outlive_the_server(serve: Serve) -> None:
    with serve() as server:
        engine = Path(f"/proc/{server.engine_pid}")
        server.process.kill()
        server.process.wait()
        while engine.exists() and "Z" not in (engine / "stat").read_text().split()[2]:
            time.sleep(0.05)


def test_a_start_that_fails_says_why_in_one_line(serve: Serve, tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for options, words in (
        (["--model", tmp_path / "nothing"], "no such file or folder"),
        (["--max-model-len", 100_000], "max_model_len"),
        (["--port", port], f"cannot listen on 127.0.0.1 port {port}: Address already in use"),
    ):
        server = serve(*options)
        assert server.wait() == 1
        [line] = server.log_text().splitlines()
        assert line.startswith("neo: error: ")
        assert words in line
    taken.close()


@pytest.mark.parametrize(
    "options",
    [["--port", 70000], ["--max-queue", -1], ["--api-key", ""], ["--request-timeout", 0]],
)
def test_wrong_options_are_usage_errors(serve: Serve, options) -> None:
    server = serve(*options)
    assert server.wait() == 2
    assert options[0].removeprefix("--").replace("-", "_") in server.log_text()
