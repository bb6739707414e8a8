"""Log-probabilities as OpenAI's completions and chats write them."""

from typing import Any

from engine.sampler import TokenLogprobs
from engine.server.token_texts import TokenTexts

LEAST_LOGPROB = -9999.0
"""What JSON, which has no infinity, shows for a probability of 0."""


def completion_logprobs(
    entries: list[TokenLogprobs], texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """Return the `logprobs` of a completion's choice.

    Args:
        entries: One a token.
        texts: Of the tokens.
        offset: Characters before the first one, in the choice's text.
    """
    tokens = [texts.text(entry.token_id) for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [_top(entry, texts) for entry in entries],
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
