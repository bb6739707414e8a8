"""What every call passes first: a request id, the API key, the size of its body, the log."""

import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.api_errors import ApiError
from engine.server.call_info import CallInfo, attach_call_info
from engine.server.json_text import to_json
from engine.server.metrics import Metrics

OPEN_PATHS = frozenset({"/", "/health"})
"""What needs no key: the page holds nothing secret, and health checks rarely have one."""

POLLED_PATHS = frozenset({"/health", "/metrics", "/dashboard/state"})
"""What machines ask for all the time; it would drown the rest of the log."""

CLIENT_CLOSED_REQUEST = 499
"""What nginx logs for a client that did not wait for its answer."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_logger = logging.getLogger("neo.access")


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: What it guards.
        api_keys: One of them must come along; empty lets everyone in.
        max_body_bytes: Most bytes of a body.
        metrics: Counts responses.
    """

    def __init__(
        self, app: ASGIApp, *, api_keys: Sequence[str], max_body_bytes: int, metrics: Metrics
    ) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        info = CallInfo(_request_id(headers.get(b"x-request-id")))
        attach_call_info(scope, info)
        start = time.perf_counter()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (b"x-request-id", info.request_id.encode())
                message["headers"] = [*message["headers"], own]
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            if refusal is not None:
                await _send_error(send_with_id, refusal)
            else:
                await self._app(scope, self._limited(receive), send_with_id)
        finally:
            if info.client_is_gone:
                status = CLIENT_CLOSED_REQUEST
            self._log(scope, info, status, time.perf_counter() - start)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._api_keys and path not in OPEN_PATHS and not self._has_key(headers):
            return ApiError(
                401,
                "an API key is needed: send it as `Authorization: Bearer KEY`",
                "invalid_request_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        """Return whether a right key came; takes the same time whichever is wrong, and where."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        found = [hmac.compare_digest(given.strip(), key) for key in self._api_keys]
        return scheme.lower() == b"bearer" and any(found)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_body_bytes} bytes; see --max-body-mb",
            "invalid_request_error",
            code="body_too_large",
        )

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` for bodies that do not tell their length beforehand."""
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _log(self, scope: Scope, info: CallInfo, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.http_responses[route, status] += 1
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            "request_id": info.request_id,
            "client": scope["client"][0] if scope.get("client") else None,
        }
        if info.num_prompt_tokens is not None:
            fields["prompt_tokens"] = info.num_prompt_tokens
            fields["output_tokens"] = info.num_output_tokens
        level = logging.DEBUG if scope["path"] in POLLED_PATHS else logging.INFO
        _logger.log(level, "request", extra=fields)


def _request_id(given: bytes | None) -> str:
    """Return the client's own id if it is harmless, else a new one."""
    text = "" if given is None else given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


async def _send_error(send: Send, error: ApiError) -> None:
    body = to_json(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.encode(), value.encode()) for name, value in (error.headers or {}).items()]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
