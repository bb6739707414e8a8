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
from engine.server.logs import configure_logging
from engine.server.startup_clock import StartupClock
from engine.server.step_record import StepRecorder
from engine.server.wire import (
    Abort,
    Add,
    Failed,
    Finish,
    Gauges,
    Progress,
    Ready,
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
        first = channel.receive(wait=True)
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
            if self._engine.has_unfinished_requests():
                deltas += self._step()
            self._channel.send(
                Report(time.monotonic(), self._gauges(), deltas, self._recorder.take())
            )
            deltas = []
            commands = self._channel.receive(wait=not self._engine.has_unfinished_requests())

    def _handle(self, command: object) -> list[TokenDelta]:
        if isinstance(command, Add):
            return self._add(command)
        if isinstance(command, Abort):
            aborted = [self._engine.abort_request(request_id) for request_id in command.request_ids]
            return [self._delta(output) for output in aborted if output is not None]
        assert isinstance(command, Stop), command
        self._is_stopping = True
        return []

    def _add(self, command: Add) -> list[TokenDelta]:
        self._num_sent[command.request_id] = 0
        try:
            self._engine.add_request(command.request_id, command.token_ids, command.params)
        except RequestError as error:
            return [self._lost(command.request_id, str(error))]
        return []

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
        )

    def _lost(self, request_id: str, message: str) -> TokenDelta:
        """Return the end of a request that the engine no longer knows, or never did."""
        del self._num_sent[request_id]
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
