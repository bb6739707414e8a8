"""Answers of a given form, through the official client."""

import json
import re

import openai
import pytest

from tests.server.conftest import PROMPT, QUESTION

pytestmark = [pytest.mark.ispc, pytest.mark.slow]

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
