"""Errors as OpenAI's API words them: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from starlette.exceptions import HTTPException

from engine.errors import RequestError


class ApiError(HTTPException):
    """An answer with an error status.

    Args:
        status: HTTP status.
        message: What is wrong, and what to do.
        kind: OpenAI's `type`.
        param: The field of the request that is to blame.
        code: For programs.
        headers: To send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the answer's body."""
        return {
            "error": {
                "message": self.detail,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the answer to a request that cannot be served as it is."""
    return ApiError(400, message, "invalid_request_error", param=param, code=code)


def from_request_error(error: RequestError) -> ApiError:
    """Return the answer to a request that the engine refuses."""
    return invalid_request(str(error), error.field)


def unavailable(message: str) -> ApiError:
    """Return the answer while the server is starting, draining or broken."""
    return ApiError(503, message, "server_error", code="unavailable", headers={"retry-after": "5"})


def engine_failure(message: str) -> ApiError:
    """Return the answer to a request that the engine lost."""
    return ApiError(500, f"the engine failed: {message}", "server_error", code="engine_error")


def timed_out(limit_s: float) -> ApiError:
    """Return the answer to a request that took too long."""
    return ApiError(
        504,
        f"the request was not done within {limit_s:g} s; ask for fewer tokens, or raise "
        "--request-timeout",
        "timeout_error",
        code="request_timeout",
    )


def queue_is_full(max_queue: int, retry_after_s: int) -> ApiError:
    """Return the answer to a request that finds too many others waiting."""
    return ApiError(
        429,
        f"{max_queue} requests are waiting already; try again in {retry_after_s} s",
        "rate_limit_error",
        code="queue_full",
        headers={"retry-after": str(retry_after_s)},
    )
