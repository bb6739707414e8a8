"""Reads server-sent events, and what OpenAI's streams say in them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import NeoError

DONE = "[DONE]"


class StreamError(NeoError):
    """A stream says that something failed, or is no stream of completions."""


class EventReader:
    """Cuts a stream of bytes into the data of its events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield the data of every line that is complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to an answer.

    Args:
        has_token: Whether it brings a token, even one without text.
        text: The text.
        finished: Whether the answer ends with it.
        usage: The server's counts, where it sends them.
    """

    has_token: bool = False
    text: str = ""
    finished: bool = False
    usage: dict[str, Any] | None = None


def parse_piece(data: str) -> Piece:
    """Read the data of one event of a completion or a chat completion.

    Raises:
        StreamError: It is an error, or not JSON.
    """
    try:
        event = json.loads(data)
    except json.JSONDecodeError as error:
        raise StreamError(f"an event is not JSON: {data[:200]}") from error
    if not isinstance(event, dict):
        raise StreamError(f"an event is no object: {data[:200]}")
    if failure := event.get("error"):
        message = failure.get("message", failure) if isinstance(failure, dict) else failure
        raise StreamError(f"the server reports: {message}")
    usage = event.get("usage")
    choices = event.get("choices") or []
    if not choices:
        return Piece(usage=usage)
    choice = choices[0]
    finished = choice.get("finish_reason") is not None
    if "text" in choice:
        text = choice["text"] or ""
        # A token may have no text of its own; the last event may have no token.
        return Piece(bool(text) or not finished, text, finished, usage)
    delta = choice.get("delta") or {}
    text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    # The first event of a chat says who speaks, and no more.
    has_token = bool(text) or ("content" in delta and "role" not in delta and not finished)
    return Piece(has_token, text, finished, usage)
