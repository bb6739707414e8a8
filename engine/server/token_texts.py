"""What single tokens look like, for log-probabilities."""

import re
from functools import lru_cache
from typing import Any

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "a"
"""A text before which a decoder that strips leading spaces has nothing to strip."""


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens, remembered.

    Args:
        tokenizer: transformers' fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = list(tokenizer.encode(_ANCHOR, add_special_tokens=False))
        self._anchor_text = self._decode(self._anchor)
        self._byte_of = {character: byte for byte, character in _byte_level_alphabet().items()}
        self.text = lru_cache(maxsize=65536)(self._find_text)
        """The text of a token as it stands behind another one."""

    def utf8(self, token_id: int) -> list[int]:
        """Return the bytes of a token, also of one that is only a part of a character."""
        text = self.text(token_id)
        if _REPLACEMENT not in text:
            return list(text.encode())
        piece = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if match := _BYTE_TOKEN.fullmatch(piece):
            return [int(match[1], 16)]
        if all(character in self._byte_of for character in piece):
            return [self._byte_of[character] for character in piece]
        return list(text.encode())

    def _find_text(self, token_id: int) -> str:
        text = self._decode([*self._anchor, token_id])
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._decode([token_id])

    def _decode(self, token_ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _byte_level_alphabet() -> dict[int, str]:
    """Return the character by which byte-level BPE writes each byte.

    Printable bytes stand for themselves, the others follow from U+0100 on in their order. Source:
    Radford et al., Language Models are Unsupervised Multitask Learners (2019), the encoder that
    was published with it.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + place) for place, byte in enumerate(others)
    }
