"""The engine process: takes commands between steps, sends one report a turn.

It lives as long as its parent's end of the socket. Signals are the parent's business: it decides
when requests have drained.
"""

import gc
import logging
import signal
import socket
import time
from collections.abc import Iterable

from engine.errors import NeoError, RequestError
from engine.llm_engine import LLMEngine
from engine.outputs import RequestOutput
from engine.request import FinishReason
from engine.server.engine_channel import EngineChannel
from engine.server.grammar_waiting import GrammarWaiting
from engine.server.logs import configure_logging
from engine.server.startup_clock import StartupClock
from engine.server.step_recorder import StepRecorder
from engine.server.wire import (
    Abort,
    Add,
    Failed,
    Finish,
    Gauges,
    Progress,
    Ready,
    Refusal,
    Report,
    Start,
    Stop,
    TokenDelta,
)

MAX_FAILED_STEPS = 3
"""Unforeseen errors in a row, without a step that works between them, before the engine gives up.

One may be a single request's doing; a device that is gone fails every step.
"""

_DRAIN_S = 5.0
_GRAMMAR_POLL_S = 0.005
_ABORT = FinishReason.ABORT.value
_logger = logging.getLogger("neo.engine")


def run_engine(sock: socket.socket, spawned_s: float, log_json: bool) -> None:
    """Be the engine process.

    Args:
        sock: Connected to the HTTP process.
        spawned_s: When the process was started, on the monotonic clock.
        log_json: How to log.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configure_logging(log_json)
    clock = StartupClock(spawned_s, "imports")
    channel = EngineChannel(sock)
    try:
        first = channel.receive(None)
        if first and isinstance(first[0], Start):
            engine = _load(first[0], channel, clock)
            try:
                EngineLoop(engine, channel).run(first[1:])
            finally:
                engine.close()
    except NeoError as error:
        channel.send(Failed(str(error), is_bug=False))
    except Exception as error:
        _logger.exception("the engine failed")
        channel.send(Failed(f"{type(error).__name__}: {error}", is_bug=True))
    channel.drain(_DRAIN_S)


def _load(start: Start, channel: EngineChannel, clock: StartupClock) -> LLMEngine:
    def on_progress(line: str) -> None:
        clock.begin(line.split()[0])
        channel.send(Progress(line))

    clock.begin("opening")
    engine = LLMEngine(start.config, on_progress)
    runner = engine.runner
    host_pool = runner.host_pool
    ready = Ready(
        limits=engine.limits,
        max_num_seqs=start.config.scheduler.max_num_seqs,
        num_device_blocks=runner.pool.num_blocks,
        num_host_blocks=host_pool.num_blocks if host_pool else 0,
        block_size=runner.pool.block_size,
        block_bytes=runner.kv_cache_bytes // runner.pool.num_blocks,
        device=str(runner.device),
        dtype=str(runner.dtype).removeprefix("torch."),
        description=runner.description,
        phases=clock.stop(),
    )
    # What was loaded stays; the collector need not walk through it in the middle of a step.
    gc.collect()
    gc.freeze()
    channel.send(ready)
    return engine


class EngineLoop:
    """Turns of: take commands, run a step, report.

    Args:
        engine: Ready to serve.
        channel: To the HTTP process.
    """

    def __init__(self, engine: LLMEngine, channel: EngineChannel) -> None:
        self._engine = engine
        self._channel = channel
        self._recorder = StepRecorder()
        engine.observe_steps(self._recorder.observe)
        self._num_sent: dict[str, int] = {}
        """Tokens sent so far, by unfinished request."""
        self._waiting = GrammarWaiting(engine.compile_grammar)
        self._refusals: list[Refusal] = []
        self._told: Gauges | None = None
        self._num_failed_steps = 0
        self._is_stopping = False

    def run(self, commands: Iterable[object] = ()) -> None:
        """Serve until told to stop, or until the HTTP process has gone.

        Args:
            commands: Those that have been received already.
        """
        deltas: list[TokenDelta] = []
        while True:
            for command in commands:
                deltas += self._handle(command)
            if self._is_stopping or self._channel.is_closed:
                return
            for command, error in self._waiting.take_ready():
                deltas += self._queue(command, error)
            if self._engine.has_unfinished_requests():
                deltas += self._step()
            self._report(deltas)
            deltas = []
            commands = self._channel.receive(self._patience_s())

    def _patience_s(self) -> float | None:
        """Return how long the loop may wait for commands; None is forever."""
        if self._engine.has_unfinished_requests():
            return 0.0
        return _GRAMMAR_POLL_S if self._waiting else None

    def _report(self, deltas: list[TokenDelta]) -> None:
        """Tell what is new; nothing if there is nothing."""
        steps, gauges = self._recorder.take(), self._gauges()
        refusals, self._refusals = self._refusals, []
        if deltas or steps or refusals or gauges != self._told:
            self._told = gauges
            self._channel.send(Report(time.monotonic(), gauges, deltas, steps, refusals))

    def _handle(self, command: object) -> list[TokenDelta]:
        if isinstance(command, Add):
            if command.params.structured_output is None:
                return self._queue(command)
            self._waiting.add(command)
            return []
        if isinstance(command, Abort):
            return [delta for name in command.request_ids for delta in self._abort(name)]
        assert isinstance(command, Stop), command
        self._is_stopping = True
        return []

    def _queue(self, command: Add, error: BaseException | None = None) -> list[TokenDelta]:
        """Give a request to the engine, unless its grammar had an error."""
        request_id, token_ids, params = command
        try:
            if error is not None:
                raise error
            self._engine.add_request(request_id, token_ids, params)
        except RequestError as error:
            self._refusals.append(Refusal(request_id, str(error), error.field))
        except Exception as error:
            _logger.exception("a request could not be queued; the others go on")
            return [self._lost(request_id, f"{type(error).__name__}: {error}")]
        else:
            self._num_sent[request_id] = 0
        return []

    def _abort(self, request_id: str) -> list[TokenDelta]:
        if self._waiting.drop(request_id):
            return [TokenDelta(request_id, "", [], None, Finish(_ABORT, None, None))]
        output = self._engine.abort_request(request_id)
        return [] if output is None else [self._delta(output)]

    def _step(self) -> list[TokenDelta]:
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._num_failed_steps += 1
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                raise
            _logger.exception("a step failed; its requests are lost, the others go on")
            lost = [name for name in self._num_sent if not self._engine.has_request(name)]
            return [self._lost(name, f"{type(error).__name__}: {error}") for name in lost]
        self._num_failed_steps = 0
        return [self._delta(output) for output in outputs]

    def _delta(self, output: RequestOutput) -> TokenDelta:
        """Return what is new in an output."""
        completion = output.outputs[0]
        request_id = output.request_id
        start = self._num_sent[request_id]
        finish = None
        if output.finished:
            del self._num_sent[request_id]
            finish = Finish(completion.finish_reason or "", completion.stop_reason, output.metrics)
        else:
            self._num_sent[request_id] = len(completion.token_ids)
        logprobs = completion.logprobs
        return TokenDelta(
            request_id,
            completion.new_text,
            completion.token_ids[start:],
            None if logprobs is None else logprobs[start:],
            finish,
            output.prompt_logprobs if start == 0 and completion.token_ids else None,
        )

    def _lost(self, request_id: str, message: str) -> TokenDelta:
        """Return the end of a request that the engine no longer knows, or never did."""
        self._num_sent.pop(request_id, None)
        return TokenDelta(request_id, "", [], None, Finish(FinishReason.ERROR.value, message, None))

    def _gauges(self) -> Gauges:
        scheduler, runner = self._engine.scheduler, self._engine.runner
        host_pool = runner.host_pool
        return Gauges(
            num_running=scheduler.num_running,
            num_running_host=scheduler.num_running_host,
            num_waiting=scheduler.num_waiting,
            num_device_used=runner.pool.num_used,
            num_host_used=host_pool.num_used if host_pool else 0,
        )
