"""The official client against a real server with a real model."""

import pytest

from engine.config import EngineConfig
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.server.conftest import PROMPT, QUESTION

pytestmark = [pytest.mark.ispc, pytest.mark.slow]

TOKENS = 24


@pytest.fixture(scope="module")
def offline() -> dict[str, str]:
    """What the engine says without a server."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    config = EngineConfig(max_model_len=1024, dtype="float32", device="cpu")
    with LLM.from_config(config) as llm:
        [completion] = llm.generate(PROMPT, params)
        [answer] = llm.chat(QUESTION, params)
    return {"completion": completion.outputs[0].text, "chat": answer.outputs[0].text}


def test_completion_streamed_whole_and_offline_are_the_same(client, model, offline) -> None:
    options = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    whole = client.completions.create(**options)
    assert whole.object == "text_completion"
    assert whole.choices[0].text == offline["completion"]
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == TOKENS
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == offline["completion"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_streamed_whole_and_offline_are_the_same(client, model, offline) -> None:
    options = {"model": model, "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(**options, max_completion_tokens=TOKENS)
    message = whole.choices[0].message
    assert (message.role, message.content) == ("assistant", offline["chat"])
    assert whole.choices[0].finish_reason == "stop"
    assert "Paris" in message.content
    chunks = list(client.chat.completions.create(**options, max_tokens=TOKENS, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in chunks) == offline["chat"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    parts = [{"type": "text", "text": QUESTION[1]["content"]}]
    messages = [QUESTION[0], {"role": "user", "content": parts}]
    same = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=TOKENS
    )
    assert same.choices[0].message.content == offline["chat"]


def test_prompts_of_every_kind_give_the_same_answer(client, model, smollm2_server) -> None:
    _, tokens = smollm2_server.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    token_ids = tokens["tokens"]
    assert tokens["count"] == len(token_ids) == len(tokens["token_strs"])
    assert smollm2_server.post("/detokenize", {"tokens": token_ids}) == (200, {"prompt": PROMPT})
    options = {"model": model, "max_tokens": 6, "temperature": 0}
    [text] = {
        choice.text
        for prompt in (PROMPT, token_ids, [PROMPT, PROMPT], [token_ids, token_ids])
        for choice in client.completions.create(prompt=prompt, **options).choices
    }
    several = client.completions.create(prompt=[PROMPT, "2 + 2 ="], n=2, **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == text
    assert several.choices[2].text == several.choices[3].text != text
    assert several.usage.prompt_tokens == len(token_ids) + 5
    assert several.usage.completion_tokens == 24


def test_echo_repeats_the_prompt(client, model) -> None:
    options = {"model": model, "temperature": 0, "prompt": PROMPT}
    plain = client.completions.create(max_tokens=4, **options).choices[0].text
    assert client.completions.create(max_tokens=4, echo=True, **options).choices[0].text == (
        PROMPT + plain
    )
    streamed = client.completions.create(max_tokens=4, echo=True, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT + plain
    assert client.completions.create(max_tokens=0, echo=True, **options).choices[0].text == PROMPT


def test_n_gives_different_answers_that_a_seed_repeats(client, model) -> None:
    options = {"model": model, "messages": QUESTION, "max_tokens": 12, "temperature": 1.5}

    def texts(**more) -> list[str]:
        choices = client.chat.completions.create(**options, **more).choices
        assert [choice.index for choice in choices] == list(range(len(choices)))
        return [choice.message.content for choice in choices]

    first = texts(n=3, seed=7)
    assert len(set(first)) == 3
    assert texts(n=3, seed=7) == first
    assert texts(seed=8) == first[1:2]  # choice i takes seed + i
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, n=3, seed=7, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content
    assert streamed == first


def test_stop_ends_the_text_before_the_stop_string(client, model, offline) -> None:
    options = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    stop = offline["completion"][10:14]
    expected = offline["completion"].partition(stop)[0]
    choice = client.completions.create(**options, stop=["never seen", stop]).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (expected, "stop", stop)
    chunks = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    kept = client.completions.create(
        **options, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == expected + stop


def test_penalties_bias_and_vllm_s_extras_reach_the_engine(client, model) -> None:
    options = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}

    def text(**more) -> str:
        return client.completions.create(**{**options, **more}).choices[0].text

    plain = text()
    assert text(logit_bias={"28": 100}) == "," * 8
    assert text(logit_bias={"28": 50}, frequency_penalty=2, presence_penalty=2) == "," * 8
    assert text(extra_body={"repetition_penalty": 50.0}) != plain
    assert text(temperature=5.0, extra_body={"top_k": 1}) == plain
    assert text(temperature=5.0, extra_body={"min_p": 1.0}) == plain
    assert text(temperature=1.0, top_p=0.001) == plain
    ended = client.completions.create(**options, logit_bias={"2": 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    on = client.completions.create(
        **options, logit_bias={"2": 100}, extra_body={"ignore_eos": True}
    )
    assert (on.usage.completion_tokens, on.choices[0].finish_reason) == (8, "length")
    later = client.completions.create(
        **options, logit_bias={"2": 100}, extra_body={"min_tokens": 3}
    )
    assert later.usage.completion_tokens == 4
    stopped = client.completions.create(
        **options, logit_bias={"28": 100}, extra_body={"stop_token_ids": [28]}
    )
    assert (stopped.usage.completion_tokens, stopped.choices[0].stop_reason) == (1, 28)


def test_token_ids_are_returned_when_asked_for(client, model) -> None:
    options = {"model": model, "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
    body = {"return_token_ids": True}
    choice = client.completions.create(**options, extra_body=body).choices[0]
    assert len(choice.token_ids) == 5
    assert len(choice.prompt_token_ids) == 7
    streamed = list(client.completions.create(**options, extra_body=body, stream=True))
    assert [i for chunk in streamed for i in chunk.choices[0].token_ids] == choice.token_ids
