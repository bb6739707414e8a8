"""From tokens to text, piece by piece, never showing half a character or half a stop string."""

from collections.abc import Sequence
from typing import Protocol

MAX_INCOMPLETE_BYTES = 3
"""A UTF-8 character has at most four bytes, so no more than this can wait for the last one."""

MAX_WINDOW_TOKENS = 32
"""Tokens that are decoded again for each new one, where text never comes to a clean end."""

_OVERLAP_TOKENS = 16
_REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer; transformers' fast tokenizers have it."""

    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool = ...,
        clean_up_tokenization_spaces: bool = ...,
    ) -> str:
        """Return the text of some tokens."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Return the tokens of a text."""


class IncrementalDetokenizer:
    """The text of one request, growing token by token.

    A tokenizer may decode a token differently after another one (spaces, bytes of one character),
    so each piece is what a short window of the newest tokens decodes to, beyond what is known of
    it already. Replacement characters at the end wait: they may become a character yet.

    Args:
        tokenizer: Decodes.
        stop: Strings that end the text.
        min_tokens: Stop strings do not count before this many tokens.
        skip_special_tokens: Leave special tokens out.
        include_stop_str: Keep the stop string at the end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        include_stop_str: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._skip_special_tokens = skip_special_tokens
        self._include_stop_str = include_stop_str
        self._token_ids: list[int] = []
        self._window_start = 0
        self._decoded_end = 0
        self._num_known = 0
        self._num_searched = 0
        self._num_released = 0
        self._text = ""
        self.stop_string: str | None = None
        """The stop string that was found."""

    @property
    def text(self) -> str:
        """What may be shown: complete characters, nothing that may become a stop string."""
        return self._text[: self._num_released]

    def append(self, token_id: int) -> str:
        """Add a token and return the text that may now be shown in addition."""
        if self.stop_string is not None:
            return ""
        self._token_ids.append(token_id)
        self._text += self._decode_new()
        self._find_stop()
        if self.stop_string is not None:
            return self._release(len(self._text))
        return self._release(len(self._text) - self._num_held_back())

    def finish(self) -> str:
        """Return what was held back, except an incomplete character."""
        return self._release(len(self._text))

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(
            self._token_ids[start:end],
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def _decode_new(self) -> str:
        """Return the text that the newest token makes certain."""
        end = len(self._token_ids)
        full = self._decode(self._window_start, end)
        complete = full.rstrip(_REPLACEMENT)
        certain = full[: max(len(complete), len(full) - MAX_INCOMPLETE_BYTES)]
        new = certain[self._num_known :]
        self._num_known = max(self._num_known, len(certain))
        if new and len(certain) == len(full):
            self._move_window(self._decoded_end, len(full))
            self._decoded_end = end
        elif end - self._window_start > MAX_WINDOW_TOKENS:
            self._move_window(end - _OVERLAP_TOKENS, len(full))
        return new

    def _move_window(self, start: int, full_length: int) -> None:
        """Let the window begin at token `start`; as many characters at its end stay unknown."""
        num_unknown = full_length - self._num_known
        self._window_start = start
        self._num_known = max(0, len(self._decode(start, len(self._token_ids))) - num_unknown)

    def _find_stop(self) -> None:
        """Cut the text at the first stop string that the newest tokens completed."""
        found = []
        if len(self._token_ids) >= self._min_tokens:
            for stop in self._stop:
                at = self._text.find(stop, max(0, self._num_searched - len(stop) + 1))
                if at >= 0:
                    found.append((at, stop))
        self._num_searched = len(self._text)
        if found:
            at, self.stop_string = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            end = at + len(self.stop_string) if self._include_stop_str else at
            self._text = self._text[:end]

    def _num_held_back(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        tail = self._text[self._num_released :]
        for length in range(min(len(tail), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(stop.startswith(tail[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, end: int) -> str:
        piece = self._text[self._num_released : end]
        self._num_released = max(self._num_released, end)
        return piece
