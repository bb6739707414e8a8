"""Prompts of a wanted length: random token ids, or text that a tokenizer turns into as many."""

import random
from typing import Any

from workloads.request import Prompt

_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "was",
    "on",
    "are",
    "as",
    "with",
)
_MAX_ROUNDS = 8


class PromptMaker:
    """Makes random prompts, and counts the tokens of given ones.

    Args:
        as_text: Make text rather than token ids.
        tokenizer: Counts and writes tokens; without one, a word is taken for a token.
        vocab_size: Token ids are drawn below this; needed for token ids without a tokenizer.
    """

    def __init__(
        self, *, as_text: bool, tokenizer: Any = None, vocab_size: int | None = None
    ) -> None:
        self.as_text = as_text
        self._tokenizer = tokenizer
        size = vocab_size or (len(tokenizer) if tokenizer is not None else None)
        special = set(getattr(tokenizer, "all_special_ids", ()))
        # The first few ids are often special.
        self._ids = [i for i in range(min(10, size - 1), size) if i not in special] if size else []

    @property
    def can_count(self) -> bool:
        """Whether lengths of texts can be told."""
        return self._tokenizer is not None

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self._encode(text))

    def given(self, text: str) -> Prompt:
        """Return a text as the prompt it becomes."""
        return text if self.as_text else self._encode(text)

    def chat(self, text: str) -> str:
        """Return a user's message inside the model's chat template, if there is one."""
        if not getattr(self._tokenizer, "chat_template", None):
            return text
        messages = [{"role": "user", "content": text}]
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )

    def random_prompt(self, num_tokens: int, rng: random.Random) -> tuple[Prompt, int]:
        """Return a random prompt and its length in tokens."""
        if not self.as_text:
            assert self._ids, "token ids need a vocabulary"
            return rng.choices(self._ids, k=num_tokens), num_tokens
        if self._tokenizer is None:
            return " ".join(rng.choices(_WORDS, k=num_tokens)), num_tokens
        return self._random_text(num_tokens, rng)

    def _random_text(self, num_tokens: int, rng: random.Random) -> tuple[str, int]:
        """Decode random tokens; what they become when they are read again may differ in number."""
        ids = rng.choices(self._ids, k=num_tokens)
        for _ in range(_MAX_ROUNDS):
            text = self._tokenizer.decode(ids)
            again = self._encode(text)
            if len(again) == num_tokens:
                break
            ids = again[:num_tokens] + rng.choices(self._ids, k=max(0, num_tokens - len(again)))
        return text, len(again)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
