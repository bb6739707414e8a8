"""Runs a generation for a client: sends what comes, and stops when nobody listens or time is up."""

import asyncio
import contextlib
from collections.abc import Callable
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.server.answer import Answer
from engine.server.api_errors import ApiError, timed_out
from engine.server.call_info import call_info
from engine.server.generation import ClientGoneError, Generation
from engine.server.json_text import DONE_EVENT, to_event, to_json
from engine.server.service import Service

_JSON = (b"content-type", b"application/json")
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
]


class Answering(Response):
    """The response that generates.

    The status is sent with the first token, so that a request that fails before it gets a true one.

    Args:
        service: The server's state.
        answer: The form of what is sent.
        start: Starts the generation.
    """

    def __init__(self, service: Service, answer: Answer, start: Callable[[], Generation]) -> None:
        super().__init__()
        self._service = service
        self._answer = answer
        self._start = start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI asks for it."""
        generation = self._start()
        watching = asyncio.ensure_future(_watch(receive, generation))
        limit_s = self._service.config.request_timeout_s
        timer = None
        if limit_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(limit_s, generation.fail, timed_out(limit_s))
        info = call_info(scope)
        info.num_prompt_tokens = self._answer.head.num_prompt_tokens
        try:
            if self._answer.head.stream:
                await self._send_events(generation, send)
            else:
                await self._send_whole(generation, send)
        except ApiError as error:
            # The engine compiles grammars, but does not know by which name they came.
            if error.status_code == HTTPStatus.BAD_REQUEST and error.param is None:
                error.param = self._answer.head.form_field
            raise
        except ClientGoneError:
            info.client_is_gone = True
        finally:
            info.num_output_tokens = generation.num_output_tokens
            if timer is not None:
                timer.cancel()
            watching.cancel()
            self._service.engine.abort(generation)

    async def _send_whole(self, generation: Generation, send: Send) -> None:
        choices = await generation.take_whole()
        body = to_json(self._answer.whole(choices, generation))
        headers = [_JSON, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_events(self, generation: Generation, send: Send) -> None:
        answer = self._answer
        deltas = await generation.take()
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        try:
            while deltas:
                events = [
                    to_event(chunk)
                    for delta in deltas
                    for chunk in answer.chunks(delta, generation)
                ]
                await _send_body(send, b"".join(events), more=True)
                deltas = await generation.take()
        except ApiError as error:
            await _send_body(send, to_event(error.body()) + DONE_EVENT, more=False)
            return
        last = DONE_EVENT
        if answer.head.include_usage:
            last = to_event(answer.usage_chunk(generation)) + last
        await _send_body(send, last, more=False)


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _watch(receive: Receive, generation: Generation) -> None:
    """Wait for the client to go away."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.fail(ClientGoneError())
