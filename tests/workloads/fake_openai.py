"""A small OpenAI-compatible server with exact behaviour, for tests of the client."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class FakeServer:
    """What the server does, and what it was asked.

    `dies_after` cuts every connection once that many tokens were sent in all, and then refuses
    service. `fails` is called with the number of a request and may give an HTTP status to answer.
    """

    pause_s: float = 0.0
    tokens_per_event: int = 1
    counts_tokens: bool = True
    dies_after: int | None = None
    fails: Callable[[int], int | None] = lambda number: None
    unknown_fields: tuple[str, ...] = ()
    says_error: bool = False
    ends_early: bool = False
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    num_sent: int = 0
    num_open: int = 0
    most_open: int = 0
    base_url: str = ""

    @property
    def is_dead(self) -> bool:
        return self.dies_after is not None and self.num_sent >= self.dies_after

    async def models(self, request: web.Request) -> web.Response:
        if self.is_dead:
            request.transport.abort()
        return web.json_response({"object": "list", "data": [{"id": "fake-model"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.is_dead:
            request.transport.abort()
            return web.Response()
        body = await request.json()
        unknown = [name for name in self.unknown_fields if name in body]
        if unknown:
            return web.json_response({"detail": f"unexpected: {unknown}"}, status=422)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        status = self.fails(len(self.bodies) - 1)
        if status is not None:
            return web.json_response({"error": {"message": "as asked"}}, status=status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await self._stream(request, response, body)
        finally:
            self.num_open -= 1
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse, body: dict) -> None:
        is_chat = "messages" in body
        if is_chat:
            await self._send(response, {"choices": [{"delta": {"role": "assistant"}}]})
        left = body["max_tokens"]
        while left:
            await asyncio.sleep(self.pause_s)
            if self.is_dead:
                request.transport.abort()
                return
            if self.says_error:
                await self._send(response, {"error": {"message": "out of order"}})
                return
            count = min(left, self.tokens_per_event)
            left -= count
            self.num_sent += count
            text = "x" * count
            choice = {"delta": {"content": text}} if is_chat else {"text": text}
            await self._send(response, {"choices": [{**choice, "finish_reason": None}]})
            if self.ends_early:
                return
        last = {"delta": {}} if is_chat else {"text": ""}
        await self._send(response, {"choices": [{**last, "finish_reason": "length"}]})
        if self.counts_tokens:
            usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
            await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")

    @staticmethod
    async def _send(response: web.StreamResponse, event: dict) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Run the server in a thread of its own."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_post("/v1/completions", server.complete)
        app.router.add_post("/v1/chat/completions", server.complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
