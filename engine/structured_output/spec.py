"""What form a caller asks the output to have; whether it is a valid grammar is checked later."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form of one request's output; exactly one field is given.

    Args:
        json_schema: A JSON schema, as text or as the value itself. The output is a JSON document
            that it accepts, with properties in the schema's order. Kept as text.
        json_object: True asks for any JSON object.
        regex: The whole output matches this regular expression (syntax of Rust's `regex`).
        choice: The output is one of these strings.
        grammar: A context-free grammar in llguidance's variant of Lark; it begins at `start`.

    Raises:
        RequestError: None or several are given, or the schema is no JSON.
    """

    json_schema: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if self._is_given(field.name)]
        if len(given) != 1:
            names = ", ".join(field.name for field in fields(self))
            got = " and ".join(given) or "none"
            raise RequestError(f"structured output must be exactly one of {names}, got {got}")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", _checked_choice(self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise RequestError(f"{name} must be a string that is not empty, got {value!r}")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(field.name for field in fields(self) if self._is_given(field.name))

    def _is_given(self, name: str) -> bool:
        value = getattr(self, name)
        return value is True if name == "json_object" else value is not None


def _schema_text(schema: object) -> str:
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"json_schema must be an object, got {text[:80]}")
    return text


def _checked_choice(choice: object) -> tuple[str, ...]:
    """Return the choices; a single string would be taken for its characters."""
    options = () if isinstance(choice, str) or not isinstance(choice, Sequence) else tuple(choice)
    if not options or not all(isinstance(option, str) and option for option in options):
        raise RequestError(f"choice must be a list of strings that are not empty, got {choice!r}")
    return options
