"""Answers of `/v1/completions`."""

from collections.abc import Sequence
from typing import Any

from engine.server.answer import Answer, AnswerHead, finish_fields
from engine.server.generation import ChoiceDelta
from engine.server.logprob_format import completion_logprobs, prompt_logprobs
from engine.server.token_texts import TokenTexts
from engine.token_logprobs import TokenLogprobs


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
        echoes: Sequence[str],
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
        text, token_ids, scored_ids = delta.text, delta.token_ids, delta.token_ids
        entries: Sequence[TokenLogprobs | None] | None = delta.logprobs
        if self.head.prompt_only:
            text, token_ids, scored_ids, entries = "", [], [], entries and []
        if self._echoes and begins:
            text = self._echoes[index] + text
            scored_ids = self._prompts[index] + scored_ids
            entries = None if entries is None else [*(delta.prompt_logprobs or []), *entries]
        logprobs = None
        if entries is not None and self._texts is not None:
            offset = self._lengths[index]
            logprobs = completion_logprobs(scored_ids, entries, self._texts, offset)
        self._lengths[index] += len(text)
        choice = {"index": index, "text": text, "logprobs": logprobs, **finish_fields(delta)}
        if self.head.return_token_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = self._prompts[index] if begins else None
        if self.head.prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs or [], self._texts)
        return choice
