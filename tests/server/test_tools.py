"""Tool calls through the official client; a tiny random model that is made to call."""

import json

import openai
import pytest

from tests.server.running_server import RunningServer

pytestmark = [pytest.mark.ispc, pytest.mark.slow]

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"type": "boolean"},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def client(tiny_server: RunningServer):
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **options):
    model = client.models.list().data[0].id
    options = {"messages": MESSAGES, "temperature": 0, **options}
    return client.chat.completions.create(model=model, **options)


def test_a_named_function_is_called_streamed_as_whole(client) -> None:
    options = {"tools": [ADD, NOW], "tool_choice": NAMED, "max_tokens": 80}
    choice = ask(client, **options).choices[0]
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.type, call.function.name) == ("function", "add")
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments["a"], int)
    assert isinstance(arguments["b"], bool)
    chunks = list(ask(client, **options, stream=True))
    news = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert news[0].function.name == "add"
    assert news[0].id.startswith("call_")
    assert all(call.id is None and call.index == 0 for call in news[1:])
    assert "".join(call.function.arguments for call in news) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_conversation_goes_on_behind_a_call(client) -> None:
    call = ask(client, tools=[ADD], tool_choice="required", max_tokens=80).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "5"}
    conversation = [*MESSAGES, call.model_dump(exclude_none=True), result]
    answer = ask(client, messages=conversation, tools=[ADD], max_tokens=4)
    assert answer.usage.prompt_tokens > 40


def test_a_model_that_is_free_to_call_talks(client) -> None:
    """A random one does; the prompt shows the tools all the same."""
    without = ask(client, max_tokens=4)
    answer = ask(client, max_tokens=4, tools=[ADD])
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls is None
    none = ask(client, max_tokens=4, tools=[ADD], tool_choice="none")
    assert none.usage.prompt_tokens == without.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].function must be an object"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [ADD], "tool_choice": "any"}, "tool_choice", "'required'"),
        (
            {"tools": [ADD], "tool_choice": NAMED, "response_format": {"type": "json_object"}},
            "tool_choice",
            "only one",
        ),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": 1}}}, "chat_template_kwargs", "hold"),
    ],
)
def test_wrong_tools_are_400(client, options, param, words) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, **options)
    assert (raised.value.param, words in raised.value.message) == (param, True), raised.value
