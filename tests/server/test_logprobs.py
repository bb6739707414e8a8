"""Log-probabilities of answers and prompts, through the official client."""

import pytest

from tests.server.conftest import PROMPT, QUESTION

pytestmark = [pytest.mark.ispc, pytest.mark.slow]


def test_logprobs_of_completions(client, model) -> None:
    options = {"model": model, "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "logprobs": 3}
    choice = client.completions.create(**options).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == [
        sum(map(len, logprobs.tokens[:place])) for place in range(len(logprobs.tokens))
    ]
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert max(top.values()) == top[token] == logprob < 0
    streamed = list(client.completions.create(**options, stream=True))
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        pieces = [getattr(chunk.choices[0].logprobs, name) for chunk in streamed]
        assert [item for piece in pieces for item in piece] == getattr(logprobs, name), name


def test_logprobs_of_chats_know_the_bytes_of_half_characters(client, model) -> None:
    bias = {"logit_bias": {}, "temperature": 0}
    messages = [{"role": "user", "content": "Repeat: 日本 🦊"}]
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=24, logprobs=True, top_logprobs=2, **bias
    )
    choice = answer.choices[0]
    assert all(len(item.top_logprobs) == 2 for item in choice.logprobs.content)
    assert all(item.token == item.top_logprobs[0].token for item in choice.logprobs.content)
    told = bytes(byte for item in choice.logprobs.content for byte in item.bytes)
    assert told.decode(errors="ignore").startswith(choice.message.content.rstrip("\ufffd"))


def test_echo_scores_the_prompt(client, model) -> None:
    options = {"model": model, "prompt": PROMPT, "temperature": 0, "logprobs": 1}
    scored = client.completions.create(**options, max_tokens=0, echo=True)
    logprobs = scored.choices[0].logprobs
    assert scored.choices[0].text == "".join(logprobs.tokens) == PROMPT
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    assert scored.usage.completion_tokens == 0
    for stream in (False, True):
        answer = client.completions.create(**options, max_tokens=2, echo=True, stream=stream)
        pieces = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        values = [value for piece in pieces for value in piece.logprobs.token_logprobs]
        assert values[:7] == logprobs.token_logprobs
        assert len(values) == 9
        assert "".join(piece.text for piece in pieces).startswith(PROMPT)


def test_prompt_logprobs_as_vllm_gives_them(client, model) -> None:
    scored = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    body = {"prompt_logprobs": 2}
    options = {"model": model, "max_tokens": 1, "extra_body": body}
    first, *others = client.completions.create(prompt=PROMPT, **options).choices[0].prompt_logprobs
    assert first is None
    own = [next(iter(entry.values())) for entry in others]
    assert [entry["logprob"] for entry in own] == scored.choices[0].logprobs.token_logprobs[1:]
    assert "".join(entry["decoded_token"] for entry in own) == PROMPT.removeprefix("The")
    assert all(2 <= len(entry) <= 3 for entry in others)
    chat = client.chat.completions.create(messages=QUESTION, **options)
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens
