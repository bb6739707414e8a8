"""The engine's side of the socket, run in a thread: failing steps, refusals, lost connections."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.sampling_params import SamplingParams
from engine.server.engine_channel import EngineChannel
from engine.server.engine_process import MAX_FAILED_STEPS, EngineLoop
from engine.server.wire import Abort, Add, FrameReader, Report, Stop, encode
from engine.structured_output import StructuredOutput

pytestmark = pytest.mark.ispc

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class _BrokenError(Exception):
    pass


class Rig:
    """An engine loop in a thread, and the HTTP process's end of its socket."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        ours, theirs = socket.socketpair()
        self.channel = EngineChannel(ours)
        self._sockets = (ours, theirs)
        self.error: BaseException | None = None
        self._loop = EngineLoop(engine, EngineChannel(theirs))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run()
        except _BrokenError as error:
            self.error = error

    def reports(self, finishes: int) -> list[Report]:
        """Reports until so many requests have ended or been refused."""
        reports: list[Report] = []
        while finishes > 0:
            new = self.channel.receive(30)
            assert new, "nothing comes"
            reports += new
            finishes -= sum(len(report.refusals) for report in new)
            finishes -= sum(delta.finish is not None for r in new for delta in r.deltas)
        return reports

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def close(self) -> None:
        ours, theirs = self._sockets
        ours.close()  # the loop ends when nobody is there
        self.join()
        theirs.close()


@pytest.fixture(scope="module")
def engine(tiny_chat_folder: Path) -> Iterator[LLMEngine]:
    options = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "threads": 1}
    engine = LLMEngine(
        EngineConfig(model=str(tiny_chat_folder), max_model_len=128, device_kv_blocks=64, **options)
    )
    yield engine
    engine.close()


@pytest.fixture
def rig(engine: LLMEngine) -> Iterator[Rig]:
    rig = Rig(engine)
    yield rig
    rig.close()
    for request_id in [name for name in "abc" if engine.has_request(name)]:
        engine.abort_request(request_id)
    assert engine.runner.pool.num_used == 0


def ends(reports: list[Report]) -> dict[str, tuple[str, object]]:
    deltas = [delta for report in reports for delta in report.deltas if delta.finish]
    return {d.request_id: (d.finish.reason, d.finish.stop_reason) for d in deltas}


def tokens(reports: list[Report], request_id: str) -> list[int]:
    deltas = [delta for report in reports for delta in report.deltas]
    return [i for delta in deltas if delta.request_id == request_id for i in delta.token_ids]


def fail_steps(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, failing: set[int]) -> None:
    """Let the steps of these numbers raise."""
    launch, count = engine.runner.launch, iter(range(1000))

    def maybe_fail(plan):
        if next(count) in failing:
            raise _BrokenError("out of luck")
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", maybe_fail)


def test_deltas_add_up_to_the_whole(rig: Rig) -> None:
    params = SamplingParams(seed=1, max_tokens=8, ignore_eos=True, skip_special_tokens=False)
    rig.channel.send(Add("a", [5, 6, 7], params))
    reports = rig.reports(1)
    deltas = [delta for report in reports for delta in report.deltas]
    assert [len(delta.token_ids) for delta in deltas] == [1] * 8
    assert all(delta.finish is None for delta in deltas[:-1])
    assert ends(reports) == {"a": ("length", None)}
    text = rig.engine.tokenizer.decode(tokens(reports, "a"))
    assert "".join(delta.text for delta in deltas) == text
    assert [step.number for report in reports for step in report.steps] == list(range(1, 9))
    assert reports[-1].gauges.num_device_used == 0


def test_a_step_with_an_unforeseen_error_loses_its_requests_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_steps(rig.engine, monkeypatch, {0})
    rig.channel.send(Add("a", [5], GREEDY))
    assert ends(rig.reports(1)) == {"a": ("error", "_BrokenError: out of luck")}
    rig.channel.send(Add("b", [5], GREEDY))
    reports = rig.reports(1)
    assert ends(reports) == {"b": ("length", None)}
    assert len(tokens(reports, "b")) == 8


def test_errors_one_after_the_other_end_the_engine(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_steps(rig.engine, monkeypatch, set(range(MAX_FAILED_STEPS)))
    for name in ("a", "b", "c")[: MAX_FAILED_STEPS - 1]:
        rig.channel.send(Add(name, [5], GREEDY))
        assert ends(rig.reports(1))[name][0] == "error"
    rig.channel.send(Add("c", [5], GREEDY))
    rig.join()
    assert isinstance(rig.error, _BrokenError)


def test_grammars_are_compiled_before_the_engine_gets_the_request(rig: Rig) -> None:
    good = SamplingParams(
        temperature=0, max_tokens=20, structured_output=StructuredOutput(choice=["red"])
    )
    bad = SamplingParams(structured_output=StructuredOutput(regex="((("))
    rig.channel.send(Add("a", [5, 6], good))
    rig.channel.send(Add("b", [5, 6], bad))
    reports = rig.reports(2)
    assert ends(reports) == {"a": ("stop", None)}
    [refusal] = [refusal for report in reports for refusal in report.refusals]
    assert (refusal.request_id, "regex cannot be used" in refusal.message) == ("b", True)


def test_aborted_requests_end_once_wherever_they_are(rig: Rig) -> None:
    waiting = SamplingParams(structured_output=StructuredOutput(regex="[a-z]{40}"))
    rig.channel.send(Add("a", [5], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)))
    rig.channel.send(Add("b", [5], waiting))
    rig.channel.send(Abort(["a", "b", "never seen"]))
    assert ends(rig.reports(2)) == {"a": ("abort", None), "b": ("abort", None)}


def test_refused_requests_are_reported_with_their_field(rig: Rig) -> None:
    rig.channel.send(Add("a", [10**6], GREEDY))
    [refusal] = [refusal for report in rig.reports(1) for refusal in report.refusals]
    assert (refusal.request_id, refusal.field) == ("a", "prompt")


def test_the_loop_ends_when_it_is_told_to(rig: Rig) -> None:
    rig.channel.send(Add("a", [5], SamplingParams(max_tokens=100, ignore_eos=True)))
    rig.channel.send(Stop())
    rig.join()
    assert rig.error is None


def test_a_reader_that_does_not_read_holds_up_no_step() -> None:
    """Reports pile up in the engine's buffer and are all there in the end."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sender, receiver = EngineChannel(theirs), EngineChannel(ours)
    for number in range(50):
        sender.send([number] * 1000)
    received = []
    while len(received) < 50:
        received += receiver.receive(0)
        sender.receive(0)
    assert [message[0] for message in received] == list(range(50))
    ours.close()
    sender.send("nobody is there")
    assert sender.is_closed
    theirs.close()


def test_frames_come_together_from_pieces_of_any_size() -> None:
    messages = [[1, 2], "x" * 5000, {}]
    data = b"".join(encode(message) for message in messages)
    for size in (1, 3, 4096, len(data)):
        reader = FrameReader()
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        assert [message for piece in pieces for message in reader.feed(piece)] == messages
