"""What all parsers of tool calls share: what they give, and how they are fed."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.tool_calls.json_scanner import CallScanner


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """News of one call, as a streaming API reports it.

    Args:
        index: Which call of the message, from 0.
        id: Its id; only in the first news of a call.
        name: Which function; only in the first news of a call.
        arguments: A piece of the JSON text of its arguments; all pieces together are the whole.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Parsed:
    """What a piece of text turned out to be: content to show, and news of calls."""

    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)

    def __iadd__(self, other: "Parsed") -> "Parsed":
        self.content += other.content
        self.calls += other.calls
        return self

    def merged_calls(self) -> list[ToolCallDelta]:
        """Return one entry a call, complete with id, name and arguments."""
        whole: dict[int, ToolCallDelta] = {}
        for delta in self.calls:
            known = whole.get(delta.index)
            whole[delta.index] = ToolCallDelta(
                index=delta.index,
                id=known.id if known else delta.id,
                name=known.name if known else delta.name,
                arguments=(known.arguments if known else "") + delta.arguments,
            )
        return list(whole.values())


class ToolCallParser(ABC):
    """Reads one completion's text, in pieces of any size; the pieces do not change the result.

    Text that turns out to be no call after all is content. Blanks between content and calls belong
    to neither.

    Args:
        make_id: Makes the id of a call.
    """

    def __init__(self, make_id: Callable[[], str]) -> None:
        self._make_id = make_id
        self.num_calls = 0
        """Calls begun so far; a message with any ends for the reason `tool_calls`."""

    @abstractmethod
    def feed(self, text: str) -> Parsed:
        """Take the next piece of text and return what is certain by now."""

    @abstractmethod
    def finish(self) -> Parsed:
        """Return what was held back; the text ends here."""

    def parse(self, text: str) -> Parsed:
        """Read a whole text at once, on a fresh parser."""
        parsed = self.feed(text)
        parsed += self.finish()
        return parsed

    def _begin_call(self, parsed: Parsed, name: str) -> None:
        parsed.calls.append(ToolCallDelta(index=self.num_calls, id=self._make_id(), name=name))
        self.num_calls += 1

    def _add_arguments(self, parsed: Parsed, piece: str) -> None:
        if piece:
            parsed.calls.append(ToolCallDelta(index=self.num_calls - 1, arguments=piece))

    def _scan(self, scanner: CallScanner, text: str, parsed: Parsed) -> str:
        """Feed a call's object, note its news, and return the text behind it."""
        was_known = scanner.name is not None
        taken = scanner.feed(text)
        if scanner.name is not None and not was_known:
            self._begin_call(parsed, scanner.name)
        self._add_arguments(parsed, scanner.take_arguments())
        return text[taken:]
