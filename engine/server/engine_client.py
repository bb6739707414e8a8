"""The HTTP side's view of the engine: requests in, deltas out, and whether it is alive."""

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from engine.config import EngineConfig
from engine.errors import NeoError, RequestError
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from engine.server.api_errors import engine_failure, from_request_error
from engine.server.engine_entry import engine_entry
from engine.server.generation import Generation
from engine.server.metrics import Metrics, RequestTrack
from engine.server.step_record import StepRecord
from engine.server.wire import (
    Abort,
    Add,
    Failed,
    FrameReader,
    Gauges,
    Progress,
    Ready,
    Report,
    Start,
    Stop,
    encode,
)

KEPT_STEPS = 2048
"""Steps that the dashboard can look back on."""

_LEAVE_S = 5.0
_REAP_S = 1.0
_logger = logging.getLogger("neo.server")


class EngineDiedError(NeoError):
    """The engine process has ended without being asked to."""


class EngineClient(asyncio.Protocol):
    """One engine process and what runs in it. Belongs to one event loop.

    Args:
        metrics: Told of everything that happens.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._ids = itertools.count()
        self._frames = FrameReader()
        self._live: dict[str, tuple[Generation, int, RequestTrack]] = {}
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._on_progress: Callable[[str], None] = lambda line: None
        self._is_stopping = False
        self._transport: asyncio.Transport | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self.gone = asyncio.Event()
        """Set when the engine has ended, whether it was asked to or not."""
        self.error: NeoError | None = None
        """Why it ended, if it was not asked to."""
        self.gauges = Gauges(0, 0, 0, 0, 0)
        self.steps: deque[StepRecord] = deque(maxlen=KEPT_STEPS)
        """The newest steps, oldest first."""
        self.last_report_s = time.monotonic()

    async def launch(self, log_json: bool) -> None:
        """Start the process; it prepares itself and waits for `load`.

        Args:
            log_json: How it logs.
        """
        ours, theirs = socket.socketpair()
        self._process = multiprocessing.get_context("spawn").Process(
            target=engine_entry, args=(theirs, time.monotonic(), log_json), name="neo-engine"
        )
        self._process.start()
        theirs.close()
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)

    async def load(self, config: EngineConfig, on_progress: Callable[[str], None]) -> Ready:
        """Let the engine load its model.

        Raises:
            NeoError: It cannot.
        """
        self._on_progress = on_progress
        self._write(Start(config))
        return await self._ready

    @property
    def num_live(self) -> int:
        """Engine requests that have not ended."""
        return len(self._live)

    @property
    def is_serving(self) -> bool:
        """Whether requests can be sent."""
        return self._ready.done() and not self.gone.is_set()

    @property
    def silent_s(self) -> float:
        """How long the engine has had requests without finishing a step."""
        return time.monotonic() - self.last_report_s if self._live else 0.0

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> Generation:
        """Start one request for each pair of prompt and parameters.

        Args:
            prompts: Their tokens; within the engine's limits.
            params: One each.
        """
        now = time.monotonic()
        if not self._live:
            self.last_report_s = now
        generation = Generation([str(next(self._ids)) for _ in prompts])
        for index, request_id in enumerate(generation.request_ids):
            track = RequestTrack(now, len(prompts[index]), params[index].max_tokens)
            self._live[request_id] = (generation, index, track)
            self._write(Add(request_id, prompts[index], params[index]))
        return generation

    def abort(self, generation: Generation) -> None:
        """End what is left of a generation; the engine does so before its next step."""
        unfinished = [name for name in generation.request_ids if name in self._live]
        if unfinished:
            self._write(Abort(unfinished))

    def fail_all(self, error: Exception) -> None:
        """Have every running generation raise an error."""
        for generation, _, _ in self._live.values():
            generation.fail(error)

    async def stop(self) -> None:
        """End the engine process, at last by force; while it still loads, by force at once."""
        self._is_stopping = True
        if self._process is None:
            return
        if not self._ready.done():  # it has nothing to finish, and may be long in hearing of it
            self._process.kill()
        self._write(Stop())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.gone.wait(), _LEAVE_S)
        await asyncio.to_thread(self._process.join, _LEAVE_S)
        if self._process.is_alive():
            _logger.warning("the engine process does not end; killing it")
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write; called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it

    def data_received(self, data: bytes) -> None:
        """Handle what the engine says; called by asyncio."""
        for message in self._frames.feed(data):
            if isinstance(message, Report):
                self._handle_report(message)
            elif isinstance(message, Progress):
                self._on_progress(message.line)
            elif isinstance(message, Ready):
                self._ready.set_result(message)
            else:
                assert isinstance(message, Failed), message
                self.error = (
                    EngineDiedError(message.message)
                    if message.is_bug
                    else NeoError(message.message)
                )

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail everything that runs: the engine has gone; called by asyncio."""
        if not self._is_stopping and self.error is None:
            self.error = EngineDiedError(
                f"the engine process ended unexpectedly ({self._how_it_ended()}); see the log"
            )
        if self.error is not None:
            self.fail_all(engine_failure(str(self.error)))
            if not self._ready.done():
                self._ready.set_exception(self.error)
        self._live.clear()
        self.gone.set()

    def _how_it_ended(self) -> str:
        assert self._process is not None
        self._process.join(_REAP_S)  # its end of the socket closes a moment before it is gone
        code = self._process.exitcode
        if code is None:
            return "closed its connection"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _handle_report(self, report: Report) -> None:
        self.last_report_s = report.time_s
        self.gauges = report.gauges
        self.steps += report.steps
        self._metrics.observe_report(report)
        for delta in report.deltas:
            generation, index, track = self._live[delta.request_id]
            self._metrics.observe_delta(track, delta, report.time_s)
            generation.put(index, delta)
            finish = delta.finish
            if finish is not None:
                del self._live[delta.request_id]
                if finish.reason == FinishReason.ERROR.value:
                    generation.fail(engine_failure(str(finish.stop_reason)))
        for refusal in report.refusals:
            generation, _, _ = self._live.pop(refusal.request_id)
            generation.fail(from_request_error(RequestError(refusal.message, refusal.field)))

    def _write(self, message: Any) -> None:
        assert self._transport is not None, "launch first"
        if not self.gone.is_set():
            self._transport.write(encode(message))
