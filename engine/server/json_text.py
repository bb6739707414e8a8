"""JSON as it goes out: compact, UTF-8."""

import json
from typing import Any

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode

DONE_EVENT = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Return a value as JSON; text that is not valid Unicode becomes question marks."""
    return _encode(value).encode(errors="replace")


def to_event(value: Any) -> bytes:
    """Return a value as a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"
