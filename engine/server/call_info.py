"""What the log wants to know of an HTTP call; it travels in the ASGI scope."""

from dataclasses import dataclass

from starlette.types import Scope

_KEY = "neo.call"


@dataclass(slots=True)
class CallInfo:
    """One call.

    `request_id` is the client's own `X-Request-Id`, or made here.
    """

    request_id: str
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    client_is_gone: bool = False


def attach_call_info(scope: Scope, info: CallInfo) -> None:
    """Let `call_info` find it."""
    scope[_KEY] = info


def call_info(scope: Scope) -> CallInfo:
    """Return what is known of the call of a scope."""
    info = scope[_KEY]
    assert isinstance(info, CallInfo)
    return info
