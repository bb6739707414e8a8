"""Log-probabilities as OpenAI's completions and chats write them."""

from collections.abc import Sequence
from typing import Any

from engine.server.token_texts import TokenTexts
from engine.token_logprobs import TokenLogprobs

LEAST_LOGPROB = -9999.0
"""What JSON, which has no infinity, shows for a probability of 0."""


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    texts: TokenTexts,
    offset: int,
) -> dict[str, Any]:
    """Return the `logprobs` of a completion's choice.

    Args:
        token_ids: The tokens.
        entries: One a token; None for a prompt's first one.
        texts: Of the tokens.
        offset: Characters before the first one, in the choice's text.
    """
    tokens = [texts.text(token_id) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "tokens": tokens,
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _top(entry, texts) for entry in entries],
    }


def chat_logprobs(entries: list[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    """Return the `logprobs` of a chat's choice."""
    return {
        "content": [
            _item(entry.token_id, entry.logprob, texts)
            | {"top_logprobs": [_item(token, value, texts) for token, value in entry.top]}
            for entry in entries
        ]
    }


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], texts: TokenTexts | None
) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: the prompt's own token and likely ones, by their ids."""
    return [None if entry is None else _by_id(entry, texts) for entry in entries]


def _by_id(entry: TokenLogprobs, texts: TokenTexts | None) -> dict[str, Any]:
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token_id, value, rank) for rank, (token_id, value) in enumerate(entry.top, 1)]
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": None if texts is None else texts.text(token_id),
        }
        for token_id, logprob, rank in ranked
    }


def _top(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    """Return the likeliest tokens by their text, and the sampled one."""
    top = {texts.text(entry.token_id): _finite(entry.logprob)}
    for token_id, logprob in entry.top:
        top.setdefault(texts.text(token_id), _finite(logprob))
    return dict(sorted(top.items(), key=lambda item: -item[1]))


def _item(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {
        "token": texts.text(token_id),
        "logprob": _finite(logprob),
        "bytes": texts.utf8(token_id),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
