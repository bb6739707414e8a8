"""Reads the JSON of calls while it is being written: where values end, and what is known already.

Not a validator: brackets and strings are followed, what stands between them is taken as it is.
"""

import json
from collections.abc import Callable

_BLANKS = " \t\r\n"


class ValueScanner:
    """Finds the end of one JSON value, character by character."""

    def __init__(self) -> None:
        self.text = ""
        """The value so far."""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def is_container(self) -> bool:
        """Whether it is an object or a list."""
        return self.text[:1] in ("{", "[")

    def take(self, char: str) -> bool:
        """Take a character and return whether the value is complete with it.

        Numbers and names end before the character that follows them: see `ends_before`.
        """
        self.text += char
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                return self._depth == 0
            return False
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def ends_before(self, char: str) -> bool:
        """Return whether the value, a number or a name, is over when `char` follows."""
        bare = bool(self.text) and not self.is_container and not self.text.startswith('"')
        return bare and char in ",}]" + _BLANKS


class CallScanner:
    """Reads one object such as `{"name": "f", "arguments": {...}}`, in any order of its keys.

    Args:
        accepts: Whether a name may be a call's.

    Attributes:
        name: The function, as soon as it is known.
        is_done: Whether the object is complete.
        has_failed: Whether it is no call: no JSON object, or without an acceptable name.
    """

    def __init__(self, accepts: Callable[[str], bool] = bool) -> None:
        self._accepts = accepts
        self.name: str | None = None
        self.is_done = False
        self.has_failed = False
        self._expect = "{"
        self._key = ""
        self._value = ValueScanner()
        self._arguments = ""
        self._num_taken = 0
        self._has_arguments = False

    def take_arguments(self) -> str:
        """Return what is new of the arguments' text; nothing before the name is known."""
        if self.name is None:
            return ""
        piece = self._arguments[self._num_taken :]
        self._num_taken = len(self._arguments)
        return piece

    def feed(self, text: str) -> int:
        """Take characters until the object is complete or fails; return how many were taken.

        The one that makes it fail is not taken.
        """
        for at, char in enumerate(text):
            if not self._take(char):
                self.has_failed = True
                return at
            if self.is_done:
                return at + 1
        return len(text)

    def _take(self, char: str) -> bool:
        """Take a character and return whether it fits."""
        if self._expect == "value":
            return self._take_of_value(char)
        if char in _BLANKS and self._expect != "key":
            return True
        if self._expect == "key":
            if self._value.take(char):
                self._key = _text_of(self._value.text) or ""
                self._expect = ":"
            return True
        return self._take_punctuation(char)

    def _take_punctuation(self, char: str) -> bool:
        expected = self._expect
        self._value = ValueScanner()
        if expected == "{" and char == "{":
            self._expect = '" or }'
        elif expected == ":" and char == ":":
            self._expect = "value"
        elif expected == ", or }" and char == ",":
            self._expect = '"'
        elif expected in ('"', '" or }') and char == '"':
            self._expect = "key"
            self._value.take(char)
        elif expected in ('" or }', ", or }") and char == "}":
            return self._end()
        else:
            return False
        return True

    def _take_of_value(self, char: str) -> bool:
        value = self._value
        if not value.text and char in _BLANKS:
            return True
        if value.ends_before(char):
            return self._end_value() and self._take(char)
        if not value.text and char in ",}]:":
            return False
        complete = value.take(char)
        if self._key in ("arguments", "parameters") and value.is_container:
            self._has_arguments = True
            self._arguments += char
        return self._end_value() if complete else True

    def _end_value(self) -> bool:
        self._expect = ", or }"
        text = self._value.text
        if self._key == "name":
            name = _text_of(text)
            if name is None or not self._accepts(name):
                return False
            self.name = name
        if self._key in ("arguments", "parameters") and not self._value.is_container:
            # Some models write the arguments' JSON into a string, or null for none.
            self._has_arguments = True
            self._arguments += _text_of(text) or "{}"
        return True

    def _end(self) -> bool:
        if self.name is None:
            return False
        if not self._has_arguments:
            self._arguments = "{}"
        self.is_done = True
        return True


def _text_of(value: str) -> str | None:
    """Return the text of a JSON string; None if it is none."""
    try:
        text = json.loads(value)
    except ValueError:
        return None
    return text if isinstance(text, str) else None
