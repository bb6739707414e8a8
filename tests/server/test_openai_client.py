"""The official client against a real server with a real model."""

import asyncio
import json
import re
import time

import openai
import pytest

from engine.config import EngineConfig
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.server.running_server import RunningServer

pytestmark = [pytest.mark.ispc, pytest.mark.slow]

PROMPT = "The three largest cities of France are"
QUESTION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
TOKENS = 24


@pytest.fixture(scope="module")
def client(smollm2_server: RunningServer):
    with openai.OpenAI(
        base_url=f"{smollm2_server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    [model] = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert model.owned_by == "neo"
    return model.id


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


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


def test_json_schema_forces_the_form_of_the_answer(client, model) -> None:
    options = {"model": model, "messages": QUESTION, "max_tokens": 60, "temperature": 0}
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = client.chat.completions.create(**options, response_format=schema)
    city = json.loads(answer.choices[0].message.content)
    assert set(city) == {"city", "people"}
    assert isinstance(city["people"], int)
    chunks = client.chat.completions.create(**options, response_format=schema, stream=True)
    streamed = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert streamed == answer.choices[0].message.content
    guided = client.chat.completions.create(**options, extra_body={"guided_json": CITY})
    assert guided.choices[0].message.content == streamed
    wanted = {"type": "json_object"}
    anything = client.chat.completions.create(**options, response_format=wanted)
    assert anything.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]"}, "[0-9]{3}-[a-f]"),
        ({"structured_outputs": {"regex": "x{3}y"}}, "xxxy"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_grammar": 'start: "a" b\nb: "c" | "d"'}, "a(c|d)"),
    ],
)
def test_expressions_choices_and_grammars(client, model, extra, pattern) -> None:
    completion = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=20, temperature=0, extra_body=extra
    )
    assert re.fullmatch(pattern, completion.choices[0].text)
    assert completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"guided_regex": "((("}, "guided_regex", "cannot be used"),
        ({"structured_outputs": {"grammar": "???"}}, "structured_outputs", "cannot be used"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "one of them"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "is missing"),
        ({"response_format": {"type": "yaml"}}, "response_format", "'json_object'"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed"),
    ],
)
def test_impossible_forms_are_400(client, model, extra, param, words) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=model, prompt=PROMPT, extra_body=extra)
    assert (raised.value.param, words in raised.value.message) == (param, True), raised.value


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


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "gpt-4"}, 404, "model", "'gpt-4' is not served here"),
        ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, 400, "max_tokens", "must be at least 1"),
        ({"max_tokens": 5000}, 400, "max_tokens", "a context of 1024 it may be at most"),
        ({"temperature": "hot"}, 400, "temperature", "valid number"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"best_of": 3}, 400, "best_of", "unless it equals n"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "from 0 to 49151"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "match pattern"),
        ({"stop": ["a"] * 17}, 400, "stop", "at most 16"),
        ({"prompt": [1, 99999]}, 400, "prompt", "from 0 to 49151"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": []}, 400, "prompt", "at least 1"),
        ({"prompt": [5] * 1024}, 400, "prompt", "with a context of 1024"),
        ({"suffix": "x"}, 400, "suffix", "not supported"),
        ({"extra_body": {"min_tokens": 9, "max_tokens": 4}}, 400, "min_tokens", "between 0 and"),
        ({"extra_body": {"use_beam_search": True}}, 400, "use_beam_search", "not supported"),
    ],
)
def test_errors_name_the_field(client, model, change, status, param, words) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(**{"model": model, "prompt": PROMPT, **change})
    error = raised.value
    assert error.status_code == status
    assert (error.param, words in error.message) == (param, True), error.message
    assert error.body["type"] == "invalid_request_error"


def test_unknown_fields_and_nulls_are_tolerated(client, model) -> None:
    body = {"some_new_field": {"a": 1}, "top_k": None, "stop": None, "temperature": None}
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=1, extra_body=body)
    assert answer.usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(client, model, smollm2_server, stream) -> None:
    """The engine stops within a step, long before the tokens that were asked for."""
    metric = smollm2_server.metric
    generated = metric("neo:generation_tokens_total")
    aborted = metric("neo:request_success_total", finished_reason="abort")

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{smollm2_server.url}/v1", api_key="x") as own:
            options = {"model": model, "prompt": PROMPT, "max_tokens": 1000}
            call = own.completions.create(**options, stream=stream, extra_body={"ignore_eos": True})
            if stream:
                async with await call as chunks:
                    await anext(chunks)
            else:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(call, 1.0)

    asyncio.run(leave())
    while metric("neo:request_success_total", finished_reason="abort") == aborted:
        time.sleep(0.05)
    assert metric("neo:num_requests_running") == metric("neo:kv_cache_usage_perc") == 0
    assert metric("neo:generation_tokens_total") < generated + 500


def test_metrics_have_vllm_s_names_and_add_up(client, model, smollm2_server) -> None:
    before = smollm2_server.metric("neo:generation_tokens_total", model_name=model, engine="0")
    client.completions.create(model=model, prompt=PROMPT, max_tokens=5, temperature=0)
    metric = smollm2_server.metric
    assert metric("neo:generation_tokens_total") == before + 5
    finished = metric("neo:request_success_total")
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert metric(f"neo:{name}_count") >= 1
        assert metric(f"neo:{name}_bucket", le="+Inf") == metric(f"neo:{name}_count")
    assert metric("neo:e2e_request_latency_seconds_count") == finished
    assert metric("neo:request_generation_tokens_sum") == metric("neo:generation_tokens_total")
    assert metric("neo:steps_total", mode="gpu_only") > 0
    assert metric("neo:http_responses_total", route="/v1/completions", status="200") > 0


def test_the_dashboard_hears_of_every_step_once(client, model, smollm2_server) -> None:
    _, state = smollm2_server.get("/dashboard/state")
    last = state["steps"][-1]["number"]
    client.completions.create(model=model, prompt=PROMPT, max_tokens=5, temperature=0)
    _, state = smollm2_server.get(f"/dashboard/state?since={last}")
    assert [step["number"] for step in state["steps"]] == list(range(last + 1, last + 6))
    assert sum(rows["gprf"] for rows in state["steps"][0]["rows"]) == 7
    assert all(rows["gdec"] == 1 for step in state["steps"][1:] for rows in step["rows"])
    starts = [step["start_s"] for step in state["steps"]]
    assert starts == sorted(starts)
    assert all(step["duration_s"] > 0 for step in state["steps"])
    assert state["gauges"]["num_device_used"] == 0
    status, page = smollm2_server.get("/")
    assert status == 200
    assert "<title>NEO</title>" in page


def test_the_answer_s_id_is_the_client_s_request_id(client, model, smollm2_server) -> None:
    raw = client.completions.with_raw_response.create(
        model=model, prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().id == "cmpl-mine-1"
    assert "request_id=mine-1" in smollm2_server.log_text()
    assert PROMPT not in smollm2_server.log_text()
    raw = client.completions.with_raw_response.create(
        model=model, prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "a b"}
    )
    assert len(raw.headers["x-request-id"]) == 32
    assert json.loads(raw.text)["id"].endswith(raw.headers["x-request-id"])
