"""Answers of `/v1/chat/completions`."""

from typing import Any

from engine.server.answer import Answer, AnswerHead, finish_fields
from engine.server.generation import ChoiceDelta
from engine.server.logprob_format import chat_logprobs
from engine.server.token_texts import TokenTexts


class ChatAnswer(Answer):
    """The assistant's message.

    Args:
        head: What every part has.
        prompt_token_ids: The conversation's tokens.
        texts: Of single tokens.
    """

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(
        self, head: AnswerHead, prompt_token_ids: list[int], texts: TokenTexts | None
    ) -> None:
        super().__init__(head)
        self._prompt_token_ids = prompt_token_ids
        self._texts = texts
        self._begun: set[int] = set()

    def chunk_choices(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Return the new content, with the role before it the first time."""
        choices = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role = {"role": "assistant", "content": ""}
            choices.append(
                {"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None}
            )
        choice = {
            "index": delta.index,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs(delta),
            **finish_fields(delta),
        }
        if self.head.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return [*choices, choice]

    def whole_choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        """Return a finished message."""
        body = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self._logprobs(choice),
            **finish_fields(choice),
        }
        if self.head.return_token_ids:
            body["token_ids"] = choice.token_ids
        return body

    def extra_fields(self) -> dict[str, Any]:
        """Return the prompt's tokens, if they were asked for."""
        return {"prompt_token_ids": self._prompt_token_ids} if self.head.return_token_ids else {}

    def _logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        if delta.logprobs is None or self._texts is None:
            return None
        return chat_logprobs(delta.logprobs, self._texts)
