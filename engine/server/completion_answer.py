"""Answers of `/v1/completions`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.server.answer import Answer, AnswerHead, finish_fields
from engine.server.generation import ChoiceDelta
from engine.server.logprob_format import completion_logprobs
from engine.server.token_texts import TokenTexts


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that goes before its choices' text.

    Args:
        text: The prompt.
        only: Whether the generated token is left out: `max_tokens` was 0.
    """

    text: str
    only: bool


class CompletionAnswer(Answer):
    """Text as it is.

    Args:
        head: What every part has.
        prompts: Tokens of each choice's prompt.
        echoes: What goes before each choice's text; empty for nothing.
        texts: Of single tokens.
    """

    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(
        self,
        head: AnswerHead,
        prompts: Sequence[list[int]],
        echoes: Sequence[Echo],
        texts: TokenTexts | None,
    ) -> None:
        super().__init__(head)
        self._prompts = prompts
        self._echoes = echoes
        self._texts = texts
        self._lengths = [0] * len(prompts)
        """Characters of each choice that have been told so far."""
        self._begun = [False] * len(prompts)

    def chunk_choices(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Return one choice; the first one of a choice begins with its echo."""
        return [self._choice(delta)]

    def whole_choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        """Return a finished choice."""
        return self._choice(choice)

    def _choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        index = delta.index
        begins = not self._begun[index]
        self._begun[index] = True
        echo = self._echoes[index] if self._echoes else None
        text = "" if echo is not None and echo.only else delta.text
        offset = self._lengths[index]
        if echo is not None and begins:
            offset += len(echo.text)
            text = echo.text + text
        self._lengths[index] += len(text)
        logprobs = None
        if delta.logprobs is not None and self._texts is not None:
            logprobs = completion_logprobs(delta.logprobs, self._texts, offset)
        choice = {"index": index, "text": text, "logprobs": logprobs, **finish_fields(delta)}
        if self.head.return_token_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = self._prompts[index] if begins else None
        return choice
