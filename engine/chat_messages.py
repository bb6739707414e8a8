"""Messages of OpenAI's API in the shape that chat templates expect."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import RequestError

ChatMessage = Mapping[str, Any]

_NOT_OF_TEMPLATES = frozenset(
    {
        "conversation",
        "chat_template",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "messages",
        "tools",
    }
)


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as templates take them.

    Parts of type text are joined, one a line. The arguments of tool calls, JSON text in the API,
    become objects, which templates write out themselves. Everything else stays as it is.

    Args:
        messages: `{"role": ..., "content": ...}` each.

    Raises:
        RequestError: A message is malformed, or has content that is no text.
    """
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def check_template_options(options: Mapping[str, Any]) -> None:
    """Refuse what is no option of a template, but would change how it is applied.

    Raises:
        RequestError: There is such an option.
    """
    for name in options:
        if name in _NOT_OF_TEMPLATES:
            raise RequestError(
                f"chat_template_kwargs must not hold {name!r}", field="chat_template_kwargs"
            )


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(f"{where} must be an object, got {_short(message)}")
    if not isinstance(message.get("role"), str):
        raise _wrong(f"{where}.role must be a string, got {_short(message.get('role'))}")
    changed = dict(message)
    if "content" in message:
        changed["content"] = _content(message["content"], f"{where}.content")
    calls = message.get("tool_calls")
    if calls is None or calls == []:
        changed.pop("tool_calls", None)  # some templates only ask whether the key is there
    elif isinstance(calls, Sequence) and not isinstance(calls, str):
        changed.setdefault("content", "")
        changed["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)
        ]
    else:
        raise _wrong(f"{where}.tool_calls must be a list, got {_short(calls)}")
    return changed


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise _wrong(f"{where} must be a string or a list of parts, got {_short(content)}")
    return "\n".join(_part(part, f"{where}[{at}]") for at, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise _wrong(f"{where} must be an object, got {_short(part)}")
    if part.get("type") != "text":
        raise _wrong(
            f"{where}.type {_short(part.get('type'))} is not supported; the model reads text only"
        )
    if not isinstance(part.get("text"), str):
        raise _wrong(f"{where}.text must be a string, got {_short(part.get('text'))}")
    return str(part["text"])


def _tool_call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise _wrong(f"{where}.function must be an object, got {_short(function)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) or arguments is None:
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise _wrong(f"{where}.function.arguments is not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise _wrong(f"{where}.function.arguments must be an object of JSON")
    return {**call, "function": {**function, "arguments": arguments}}


def _short(value: object) -> str:
    return json.dumps(value, default=str)[:80]


def _wrong(message: str) -> RequestError:
    return RequestError(message, field="messages")
