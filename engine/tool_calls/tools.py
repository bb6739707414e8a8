"""The functions that a request offers to the model, in OpenAI's form, checked."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Args:
        name: Letters, digits, `_`, `.` and `-`.
        parameters: JSON schema of its arguments, an object.
        definition: All of it as it was given, for the chat template.
    """

    name: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any]

    @classmethod
    def parse(cls, definition: object, where: str) -> "Tool":
        """Check one entry of `tools`.

        Args:
            definition: `{"type": "function", "function": {"name": ..., "parameters": ...}}`.
            where: What to call it in messages.

        Raises:
            RequestError: It is not of that form.
        """
        if not isinstance(definition, Mapping):
            raise _wrong(f"{where} must be an object, got {_short(definition)}")
        if definition.get("type", "function") != "function":
            raise _wrong(f'{where}.type must be "function", got {_short(definition["type"])}')
        function = definition.get("function")
        if not isinstance(function, Mapping):
            raise _wrong(f"{where}.function must be an object, got {_short(function)}")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _wrong(
                f"{where}.function.name must have 1 to 64 letters, digits, '_', '.' or '-', "
                f"got {_short(name)}"
            )
        if parameters is None:
            parameters = _NO_PARAMETERS
        if not isinstance(parameters, Mapping):
            raise _wrong(
                f"{where}.function.parameters must be a JSON schema, got {_short(parameters)}"
            )
        return cls(name, parameters, definition)


def parse_tools(definitions: Sequence[object]) -> list[Tool]:
    """Check a request's `tools`.

    Raises:
        RequestError: One is malformed, or two have the same name.
    """
    tools = [Tool.parse(item, f"tools[{at}]") for at, item in enumerate(definitions)]
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise _wrong(f"tools must have different names, got {name!r} more than once")
    return tools


def _short(value: object) -> str:
    return json.dumps(value, default=str)[:80]


def _wrong(message: str) -> RequestError:
    return RequestError(message, field="tools")
