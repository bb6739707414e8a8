"""From the messages of a chat request to what chat templates know."""

from collections.abc import Sequence
from typing import Any

from engine.server.request_models import ChatMessage

_ROLES = {"developer": "system"}
"""Roles that OpenAI has added since, by the one that templates know."""


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages whose content is text alone; several parts become lines of it."""
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    plain: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role),
        "content": content or "",
    }
    for name in ("name", "tool_calls", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    return plain
