"""Answers of `/v1/chat/completions`."""

from collections.abc import Sequence
from typing import Any

from engine.server.answer import Answer, AnswerHead, finish_fields
from engine.server.generation import ChoiceDelta
from engine.server.logprob_format import chat_logprobs, prompt_logprobs
from engine.server.token_texts import TokenTexts
from engine.tool_calls import Parsed, ToolCallDelta, ToolCallParser

CALLED_TOOLS = "tool_calls"
"""The reason for which a message ends that calls functions."""


class ChatAnswer(Answer):
    """The assistant's message.

    Args:
        head: What every part has.
        prompt_token_ids: The conversation's tokens.
        texts: Of single tokens.
        parsers: One a choice, to find calls of functions; empty without tools.
    """

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(
        self,
        head: AnswerHead,
        prompt_token_ids: list[int],
        texts: TokenTexts | None,
        parsers: Sequence[ToolCallParser],
    ) -> None:
        super().__init__(head)
        self._prompt_token_ids = prompt_token_ids
        self._texts = texts
        self._parsers = parsers
        self._begun: set[int] = set()

    def chunk_choices(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Return the new content, with the role before it the first time."""
        index = delta.index
        choices = []
        if index not in self._begun:
            self._begun.add(index)
            role = {"role": "assistant", "content": ""}
            choices.append({"index": index, "delta": role, "logprobs": None, "finish_reason": None})
        parsed = self._parse(delta)
        if self._is_silent(parsed, delta):
            return choices
        news: dict[str, Any] = {}
        if parsed.content or not parsed.calls:
            news["content"] = parsed.content
        if parsed.calls:
            news["tool_calls"] = [_call_news(call) for call in parsed.calls]
        choice = {
            "index": index,
            "delta": news,
            "logprobs": self._logprobs(delta),
            **self._finish_fields(delta),
        }
        if self.head.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return [*choices, choice]

    def _is_silent(self, parsed: Parsed, delta: ChoiceDelta) -> bool:
        """Return whether a delta, read for calls, tells nothing yet."""
        tells = parsed.content or parsed.calls or delta.finish or delta.logprobs is not None
        return bool(self._parsers) and not tells and not self.head.return_token_ids

    def whole_choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        """Return a finished message."""
        parsed = self._parse(choice)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if parsed.calls:
            message["content"] = parsed.content or None
            message["tool_calls"] = [_whole_call(call) for call in parsed.merged_calls()]
        body = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice),
            **self._finish_fields(choice),
        }
        if self.head.return_token_ids:
            body["token_ids"] = choice.token_ids
        return body

    def extra_fields(self, choices: list[ChoiceDelta]) -> dict[str, Any]:
        """Return what was asked for of the prompt."""
        extra: dict[str, Any] = {}
        if self.head.return_token_ids:
            extra["prompt_token_ids"] = self._prompt_token_ids
        if self.head.prompt_logprobs:
            extra["prompt_logprobs"] = prompt_logprobs(
                choices[0].prompt_logprobs or [], self._texts
            )
        return extra

    def _parse(self, delta: ChoiceDelta) -> Parsed:
        """Return what a delta's text means; at the end, also what was held back before."""
        if not self._parsers:
            return Parsed(delta.text)
        parser = self._parsers[delta.index]
        parsed = parser.feed(delta.text)
        if delta.finish is not None:
            parsed += parser.finish()
        return parsed

    def _finish_fields(self, delta: ChoiceDelta) -> dict[str, Any]:
        fields = finish_fields(delta)
        called = bool(self._parsers) and self._parsers[delta.index].num_calls > 0
        if called and fields["finish_reason"] == "stop":
            fields["finish_reason"] = CALLED_TOOLS
        return fields

    def _logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        if delta.logprobs is None or self._texts is None:
            return None
        return chat_logprobs(delta.logprobs, self._texts)


def _call_news(call: ToolCallDelta) -> dict[str, Any]:
    """Return news of a call; its id and name come once, in the first ones."""
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    function = {"name": call.name, **function}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _whole_call(call: ToolCallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
