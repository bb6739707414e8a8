"""Hermes and Qwen 2.5/3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number."""

from collections.abc import Callable

from engine.tool_calls.held_text import HeldText
from engine.tool_calls.json_scanner import CallScanner
from engine.tool_calls.parser import Parsed, ToolCallParser

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(ToolCallParser):
    """Content, then calls between tags; content may follow.

    Args:
        make_id: Makes the id of a call.
    """

    def __init__(self, make_id: Callable[[], str]) -> None:
        super().__init__(make_id)
        self._text = HeldText(BEGIN)
        self._scanner: CallScanner | None = None
        self._raw = ""
        self._closing: str | None = None

    def feed(self, text: str) -> Parsed:
        """See `ToolCallParser.feed`."""
        parsed = Parsed()
        while text:
            if self._scanner is not None:
                text = self._feed_call(self._scanner, text, parsed)
            elif self._closing is not None:
                text = self._feed_closing(self._closing + text)
            else:
                text = self._feed_content(text, parsed)
        return parsed

    def finish(self) -> Parsed:
        """See `ToolCallParser.finish`."""
        parsed = Parsed()
        if self._scanner is not None and self._scanner.name is None:
            parsed.content += self._raw
        held = self._text.finish()
        if held.strip() or not self.num_calls:
            parsed.content += held
        self._scanner = self._closing = None
        return parsed

    def _feed_content(self, text: str, parsed: Parsed) -> str:
        content, rest = self._text.feed(text)
        parsed.content += content
        if rest is None:
            return ""
        self._scanner = CallScanner()
        self._raw = self._text.blanks + BEGIN
        return rest

    def _feed_call(self, scanner: CallScanner, text: str, parsed: Parsed) -> str:
        rest = self._scan(scanner, text, parsed)
        self._raw += text[: len(text) - len(rest)]
        if scanner.is_done or (scanner.has_failed and scanner.name is not None):
            self._scanner, self._closing = None, ""
        elif scanner.has_failed:
            parsed.content += self._raw
            self._scanner = None
        return rest

    def _feed_closing(self, text: str) -> str:
        """Take the closing tag, if it comes; return the text behind it."""
        text = text.lstrip()
        if END.startswith(text) and text != END:
            self._closing = text
            return ""
        self._closing = None
        self._text.skip_blanks()
        return text.removeprefix(END)
