import math

import pytest

from tests.workloads.fake_openai import FakeServer, serving
from workloads.arrivals import ArrivalConfig, arrival_times
from workloads.bench.system import Job
from workloads.drivers.http_client import HttpTarget, run_job
from workloads.drivers.sse import EventReader, Piece, StreamError, parse_piece
from workloads.records import RunRecord
from workloads.request import WorkloadRequest


def job(count: int, output: int = 4, rate: float = math.inf, **options) -> Job:
    requests = [
        WorkloadRequest(num_prompt_tokens=3, num_output_tokens=output, prompt=f"prompt {i}")
        for i in range(count)
    ]
    times = arrival_times(ArrivalConfig(request_rate=rate, burstiness=math.inf), count)
    return Job(requests=requests, arrivals=times, **options)


def run(server: FakeServer, wanted: Job, **options) -> RunRecord:
    finished = []
    with serving(server):
        target = HttpTarget(base_url=server.base_url, model="m", **options)
        record = run_job(target, wanted, finished.append)
    assert finished == list(range(1, len(wanted.requests) + 1))
    return record


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_every_token_is_timed_and_counted(backend: str) -> None:
    server = FakeServer()
    record = run(server, job(5), backend=backend)
    assert all(r.completed for r in record.requests)
    for request in record.requests:
        assert len(request.token_times_s) == request.num_output_tokens == 4
        assert request.token_times_s == sorted(request.token_times_s)
        assert request.start_s <= request.token_times_s[0]
        assert request.num_prompt_tokens == 7  # the server's own count
        assert request.text == "xxxx"
    assert record.warnings == []
    assert record.duration_s >= max(r.end_s for r in record.requests)


def test_requests_carry_what_was_asked() -> None:
    server = FakeServer()
    run(
        server,
        job(1),
        headers={"Authorization": "Bearer key"},
        extra_body={"top_k": 5, "stream_options": None},
    )
    [body] = server.bodies
    assert body == {
        "model": "m",
        "prompt": "prompt 0",
        "max_tokens": 4,
        "temperature": 0.0,
        "stream": True,
        "ignore_eos": True,
        "top_k": 5,
    }
    assert server.headers[0]["Authorization"] == "Bearer key"


def test_several_tokens_in_one_event_count_as_the_server_says() -> None:
    record = run(FakeServer(tokens_per_event=2), job(1, output=6))
    [request] = record.requests
    assert len(request.token_times_s) == 3
    assert request.num_output_tokens == 6


def test_a_server_that_does_not_count_is_mentioned() -> None:
    record = run(FakeServer(counts_tokens=False), job(2))
    assert [r.num_output_tokens for r in record.requests] == [4, 4]
    assert "did not count the tokens of 2 answers" in record.warnings[0]


def test_requests_are_sent_at_their_time() -> None:
    record = run(FakeServer(), job(4, rate=20.0))
    for request in record.requests:
        assert request.start_s >= request.scheduled_s
    assert record.requests[-1].scheduled_s == pytest.approx(0.2)


def test_concurrency_is_limited() -> None:
    server = FakeServer(pause_s=0.005)
    record = run(server, job(8, max_concurrency=2))
    assert server.most_open == 2
    assert record.requests[-1].start_s >= record.requests[0].end_s


def test_failed_requests_are_recorded_beside_the_others() -> None:
    server = FakeServer(fails=lambda number: 503 if number % 2 else None)
    record = run(server, job(6))
    failed = [r.error for r in record.requests if not r.completed]
    assert len(failed) == 3
    assert all("HTTP 503" in error and "as asked" in error for error in failed)


def test_an_unreachable_server_fails_every_request() -> None:
    with serving(FakeServer()) as server:
        pass
    record = run_job(HttpTarget(base_url=server.base_url, model="m"), job(3), lambda count: None)
    assert ["connection lost" in r.error for r in record.requests] == [True] * 3


def test_a_server_that_dies_in_the_middle() -> None:
    record = run(FakeServer(dies_after=6, pause_s=0.001), job(4))
    assert not all(r.completed for r in record.requests)
    assert any("in the middle of its answer" in (r.error or "") for r in record.requests)


@pytest.mark.parametrize(
    ("server", "says"),
    [
        (FakeServer(says_error=True), "the server reports: out of order"),
        (FakeServer(ends_early=True), "the stream ended in the middle"),
    ],
)
def test_streams_that_fail_say_why(server: FakeServer, says: str) -> None:
    [request] = run(server, job(1)).requests
    assert says in request.error
    assert not request.completed


def test_short_answers_are_mentioned() -> None:
    """A server that knows no ignore_eos may stop early."""
    with serving(FakeServer()) as server:
        target = HttpTarget(base_url=server.base_url, model="m", extra_body={"max_tokens": 2})
        record = run_job(target, job(3), lambda count: None)
    assert record.warnings == ["3 answers are shorter than asked for"]


def test_events_are_cut_wherever_the_network_cuts_them() -> None:
    stream = 'data: {"a": "ä"}\r\n\r\n: comment\n\ndata: [DONE]\n\n'.encode()
    for size in (1, 3, len(stream)):
        reader = EventReader()
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [e for p in pieces for e in reader.feed(p)] == ['{"a": "ä"}', "[DONE]"]


@pytest.mark.parametrize(
    ("event", "piece"),
    [
        ('{"choices": [{"text": "", "finish_reason": null}]}', Piece(True)),
        ('{"choices": [{"text": "", "finish_reason": "stop"}]}', Piece(False, "", True)),
        ('{"choices": [{"text": "a", "finish_reason": "stop"}]}', Piece(True, "a", True)),
        ('{"choices": [{"delta": {"role": "assistant", "content": ""}}]}', Piece()),
        ('{"choices": [{"delta": {"reasoning_content": "hm"}}]}', Piece(True, "hm")),
        ('{"choices": [{"delta": {"content": ""}}]}', Piece(True)),
        (
            '{"choices": [], "usage": {"completion_tokens": 3}}',
            Piece(usage={"completion_tokens": 3}),
        ),
    ],
)
def test_pieces(event: str, piece: Piece) -> None:
    assert parse_piece(event) == piece


@pytest.mark.parametrize("event", ["{", "[]", '{"error": "full"}'])
def test_broken_events_say_so(event: str) -> None:
    with pytest.raises(StreamError):
        parse_piece(event)
