"""Sends a workload to an OpenAI-compatible server and times every piece of the answers."""

import asyncio
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from workloads.bench.system import Job
from workloads.drivers.sse import DONE, EventReader, StreamError, parse_piece
from workloads.records import RequestRecord, RunRecord
from workloads.request import WorkloadRequest

BACKENDS = ("openai", "openai-chat")
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
_SILENCE_LIMIT_S = 600.0
"""A server that says nothing for so long is given up, for this request."""
_BODY_SHOWN = 300
_LATE_S = 0.1
_LATE_SHARE = 0.02
"""Requests sent later than both are worth a warning: a moment, and a share of the run."""
_BUSY_SHARE = 0.9
_LEAST_DURATION_S = 1.0
"""Shorter runs say nothing about how busy the client is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpTarget:
    """A server, and how to ask it.

    Args:
        base_url: Scheme, host and port.
        model: The name that requests carry.
        backend: One of `BACKENDS`.
        endpoint: Path; None is the backend's.
        headers: Sent along.
        ignore_eos: Ask for as many tokens as the workload wants, end of sequence or not.
        temperature: Of sampling.
        extra_body: Added to every request; a value of None takes a key away.
    """

    base_url: str
    model: str
    backend: str = "openai"
    endpoint: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    ignore_eos: bool = True
    temperature: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url.rstrip("/") + (self.endpoint or ENDPOINTS[self.backend])

    def body(self, request: WorkloadRequest) -> dict[str, Any]:
        """Return a request's JSON."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.num_output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.backend == "openai-chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        body |= self.extra_body
        return {name: value for name, value in body.items() if value is not None}


def run_job(target: HttpTarget, job: Job, on_finished: Callable[[int], None]) -> RunRecord:
    """Send a workload and wait for all answers; failures are recorded, not raised."""
    return asyncio.run(_Client(target, job, on_finished).run())


class _Client:
    """One run: a task a request, all on one connection pool without a limit."""

    def __init__(self, target: HttpTarget, job: Job, on_finished: Callable[[int], None]) -> None:
        self._target = target
        self._job = job
        self._on_finished = on_finished
        self._num_finished = 0
        self._start = 0.0
        self._slots = asyncio.Semaphore(job.max_concurrency) if job.max_concurrency else None
        self._uncounted = 0
        self.records = [
            RequestRecord(
                num_prompt_tokens=request.num_prompt_tokens,
                wanted_output_tokens=request.num_output_tokens,
                scheduled_s=arrival,
            )
            for request, arrival in zip(job.requests, job.arrivals, strict=True)
        ]

    async def run(self) -> RunRecord:
        """Send every request at its time."""
        _allow_many_connections(len(self.records))
        timeout = aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_LIMIT_S)
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self._target.headers, read_bufsize=2**18
        ) as http:
            self._start = time.perf_counter()
            cpu_start = time.thread_time()
            tasks = []
            for request, record in zip(self._job.requests, self.records, strict=True):
                delay = record.scheduled_s - self._now()
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.append(asyncio.create_task(self._send(http, request, record)))
            await asyncio.gather(*tasks)
            duration_s = self._now()
            cpu_share = (time.thread_time() - cpu_start) / duration_s
        return self._result(duration_s, cpu_share)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _send(
        self, http: aiohttp.ClientSession, request: WorkloadRequest, record: RequestRecord
    ) -> None:
        if self._slots is None:
            await self._exchange(http, request, record)
        else:
            async with self._slots:
                await self._exchange(http, request, record)
        self._num_finished += 1
        self._on_finished(self._num_finished)

    async def _exchange(
        self, http: aiohttp.ClientSession, request: WorkloadRequest, record: RequestRecord
    ) -> None:
        body = self._target.body(request)
        record.start_s = self._now()
        try:
            async with http.post(self._target.url, json=body) as response:
                if response.status != 200:
                    text = (await response.text(errors="replace"))[:_BODY_SHOWN]
                    record.error = f"HTTP {response.status}: {' '.join(text.split())}"
                    return
                await self._read(response, record)
        except StreamError as error:
            record.error = str(error)
        except asyncio.TimeoutError:
            record.error = f"no answer for {_SILENCE_LIMIT_S:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            after = " in the middle of its answer" if record.token_times_s else ""
            record.error = f"connection lost{after} ({type(error).__name__})"

    async def _read(self, response: aiohttp.ClientResponse, record: RequestRecord) -> None:
        """Take in a stream; it must end as OpenAI's do."""
        reader, texts, ended, counted = EventReader(), [], False, False
        async for data in response.content.iter_any():
            now = self._now()
            for event in reader.feed(data):
                if event == DONE:
                    ended = True
                    continue
                piece = parse_piece(event)
                if piece.has_token:
                    record.token_times_s.append(now)
                    texts.append(piece.text)
                ended = ended or piece.finished
                if piece.usage:
                    record.num_output_tokens = int(piece.usage.get("completion_tokens") or 0)
                    prompt_tokens = piece.usage.get("prompt_tokens")
                    record.num_prompt_tokens = int(prompt_tokens or record.num_prompt_tokens)
                    counted = record.num_output_tokens > 0
        record.text = "".join(texts)
        if not counted:
            record.num_output_tokens = len(record.token_times_s)
            self._uncounted += 1
        if not ended:
            record.error = "the stream ended in the middle of the answer"
        elif not record.token_times_s:
            record.error = "the answer has no token"
        else:
            record.end_s = self._now()

    def _result(self, duration_s: float, cpu_share: float) -> RunRecord:
        lateness = sorted(r.start_s - r.scheduled_s for r in self.records)
        late = 0.0 if self._slots is not None else lateness[int(0.99 * (len(lateness) - 1))]
        warnings = []
        if late > max(_LATE_S, _LATE_SHARE * duration_s):
            warnings.append(
                f"the client could not keep up with the asked rate: 1 % of the requests were sent "
                f"{late:.2f} s late or more"
            )
        if cpu_share > _BUSY_SHARE and duration_s > _LEAST_DURATION_S:
            warnings.append(
                f"the client was busy {cpu_share:.0%} of the time: latencies include its own delays"
            )
        if self._uncounted:
            warnings.append(
                f"the server did not count the tokens of {self._uncounted} answers; pieces of "
                "text were counted instead"
            )
        short = sum(
            r.completed and r.num_output_tokens < r.wanted_output_tokens for r in self.records
        )
        if short:
            warnings.append(f"{short} answers are shorter than asked for")
        return RunRecord(
            requests=self.records,
            duration_s=duration_s,
            details={"client_cpu_share": cpu_share, "p99_lateness_s": late},
            warnings=warnings,
        )


def _allow_many_connections(count: int) -> None:
    """Raise the limit on open files as far as it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
