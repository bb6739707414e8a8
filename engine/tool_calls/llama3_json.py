"""Llama 3.1 and later: the message is `{"name": ..., "parameters": {...}}`, or several with `;`.

Nothing marks a call, so JSON whose name is none of the request's functions is content.
"""

from collections.abc import Callable, Collection

from engine.tool_calls.json_scanner import CallScanner
from engine.tool_calls.parser import Parsed, ToolCallParser

PYTHON_TAG = "<|python_tag|>"
_BETWEEN_CALLS = " \t\r\n;"


class Llama3JsonParser(ToolCallParser):
    """Calls from the first character on, or content.

    Args:
        make_id: Makes the id of a call.
        names: The functions that may be called.
    """

    def __init__(self, make_id: Callable[[], str], names: Collection[str]) -> None:
        super().__init__(make_id)
        self._names = frozenset(names)
        self._scanner: CallScanner | None = None
        self._raw = ""
        """What has been read and is neither content nor part of a call that is certain."""
        self._is_content = False

    def feed(self, text: str) -> Parsed:
        """See `ToolCallParser.feed`."""
        parsed = Parsed()
        while text and not self._is_content:
            if self._scanner is None:
                text = self._feed_start(text)
            else:
                text = self._feed_call(self._scanner, text, parsed)
        parsed.content += text
        return parsed

    def finish(self) -> Parsed:
        """See `ToolCallParser.finish`."""
        raw, self._raw = self._raw, ""
        is_left_over = self.num_calls and not raw.strip(_BETWEEN_CALLS)
        return Parsed(content="" if is_left_over else raw)

    def _feed_start(self, text: str) -> str:
        """Skip what may stand before a call and return what begins it."""
        self._raw += text
        begin = self._raw.lstrip(_BETWEEN_CALLS if self.num_calls else None)
        if not self.num_calls:
            if PYTHON_TAG.startswith(begin) and begin != PYTHON_TAG:
                return ""
            begin = begin.removeprefix(PYTHON_TAG).lstrip()
        if begin:
            self._raw = self._raw[: len(self._raw) - len(begin)]
            self._scanner = CallScanner(self._names.__contains__)
        return begin

    def _feed_call(self, scanner: CallScanner, text: str, parsed: Parsed) -> str:
        rest = self._scan(scanner, text, parsed)
        if scanner.name is not None:
            self._raw = ""
        else:
            self._raw += text[: len(text) - len(rest)]
        if scanner.is_done:
            self._scanner = None
        elif scanner.has_failed:
            parsed.content += self._raw
            self._raw, self._is_content = "", True
        return rest
