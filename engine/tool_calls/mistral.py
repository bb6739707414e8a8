"""Mistral: `[TOOL_CALLS]`, then a list of calls, or, in newer models, each call behind its own.

The list is `[{"name": ..., "arguments": {...}}, ...]`; the newer form is `[TOOL_CALLS]name{...}`,
with `[ARGS]` between name and arguments in the newest. The marker is a special token, so the text
must be decoded with special tokens.
"""

import secrets
import string
from collections.abc import Callable

from engine.tool_calls.held_text import HeldText
from engine.tool_calls.json_scanner import CallScanner, ValueScanner
from engine.tool_calls.parser import Parsed, ToolCallParser

BEGIN, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
_ID_LENGTH = 9


def mistral_call_id() -> str:
    """Return an id of the only form that Mistral's templates take: nine letters and digits."""
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(_ID_LENGTH))


class MistralParser(ToolCallParser):
    """Content, then calls.

    Args:
        make_id: Makes the id of a call.
        in_calls: The text begins with the list of calls, without the marker.
    """

    def __init__(self, make_id: Callable[[], str], *, in_calls: bool = False) -> None:
        super().__init__(make_id)
        self._text = HeldText(BEGIN)
        self._raw = ""
        self._read = self._read_first if in_calls else self._read_content
        self._scanner = CallScanner()
        self._value = ValueScanner()

    def feed(self, text: str) -> Parsed:
        """See `ToolCallParser.feed`."""
        parsed = Parsed()
        while text:
            text = self._read(text, parsed)
        return parsed

    def finish(self) -> Parsed:
        """See `ToolCallParser.finish`."""
        held = self._raw + self._text.finish()
        self._raw = ""
        return Parsed(content=held if held.strip() or not self.num_calls else "")

    def _read_content(self, text: str, parsed: Parsed) -> str:
        content, rest = self._text.feed(text)
        parsed.content += content
        if rest is None:
            return ""
        self._raw = self._text.blanks + BEGIN
        self._read = self._read_first
        return rest

    def _read_first(self, text: str, parsed: Parsed) -> str:
        """Skip blanks behind the marker and see which form follows."""
        begin = text.lstrip()
        self._raw += text[: len(text) - len(begin)]
        if begin:
            self._read = self._read_list if begin[0] == "[" else self._read_name
        return begin

    def _read_list(self, text: str, parsed: Parsed) -> str:
        """Read what stands before a call in the list: its bracket, or a comma."""
        begin = text.lstrip(", \t\r\n" if self.num_calls else "[ \t\r\n")
        if not self.num_calls:
            self._raw += text[: len(text) - len(begin)]
        if not begin:
            return ""
        if begin[0] == "]":
            self._raw = ""
            self._end_calls()
            return begin[1:]
        self._scanner = CallScanner()
        self._read = self._read_object
        return begin

    def _read_object(self, text: str, parsed: Parsed) -> str:
        scanner = self._scanner
        rest = self._scan(scanner, text, parsed)
        if scanner.name is not None:
            self._raw = ""
        else:
            self._raw += text[: len(text) - len(rest)]
        if scanner.is_done:
            self._read = self._read_list
        elif scanner.has_failed:
            self._give_up(parsed)
        return rest

    def _read_name(self, text: str, parsed: Parsed) -> str:
        """Read `name`, perhaps `[ARGS]`, up to the arguments' bracket."""
        before, bracket, rest = text.partition("{")
        self._raw += before
        if not bracket:
            return ""
        name = self._raw.partition(BEGIN)[2].removesuffix(ARGUMENTS).partition("[")[0].strip()
        if not name:
            self._give_up(parsed)
            return bracket + rest
        self._raw = ""
        self._begin_call(parsed, name)
        self._value = ValueScanner()
        self._read = self._read_arguments
        return bracket + rest

    def _read_arguments(self, text: str, parsed: Parsed) -> str:
        for at, char in enumerate(text, start=1):
            if self._value.take(char):
                self._add_arguments(parsed, text[:at])
                self._end_calls()
                return text[at:]
        self._add_arguments(parsed, text)
        return ""

    def _end_calls(self) -> None:
        self._text.skip_blanks()
        self._read = self._read_content

    def _give_up(self, parsed: Parsed) -> None:
        """It is no call: what was read is content."""
        parsed.content += self._raw
        self._raw = ""
        self._read = self._read_content
