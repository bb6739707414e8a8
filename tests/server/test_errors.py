"""Wrong requests: the status, and the field that is to blame."""

import openai
import pytest

from tests.server.conftest import PROMPT
from tests.server.running_server import RunningServer

pytestmark = [pytest.mark.ispc, pytest.mark.slow]


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


def test_bodies_of_another_type_are_told_the_right_one(tiny_server: RunningServer) -> None:
    header = {"content-type": "application/x-www-form-urlencoded"}
    status, answer = tiny_server.post("/v1/completions", {"prompt": "x"}, **header)
    assert status == 400
    assert "Content-Type: application/json" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "JSON decode error"),
        (b"[]", "valid dictionary"),
        (b"", "Field required"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "x", "temperature": NaN}', "finite number"),
        (b'{"prompt": "x", "max_tokens": 99999999999999999999}', "less than or equal to"),
        (b'{"prompt": "x", "top_k": true}', "valid integer"),
        (b'{"prompt": "x", "stream_options": {}}', "needs stream"),
        (b"\xff\xfe", ""),
    ],
)
def test_broken_bodies_are_400(tiny_server: RunningServer, body, words) -> None:
    status, answer = tiny_server.post("/v1/completions", body)
    assert status == 400, answer
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]", "'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0]",
            "text",
        ),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ],
)
def test_wrong_chats_are_400(tiny_server: RunningServer, change, param, words) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **change}
    status, answer = tiny_server.post("/v1/chat/completions", chat)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert words in answer["error"]["message"]


def test_unknown_paths_and_methods_have_openai_s_error_shape(tiny_server: RunningServer) -> None:
    for call, status in (
        (tiny_server.get("/nowhere"), 404),
        (tiny_server.get("/v1/completions"), 405),
        (tiny_server.get("/v1/models/unknown/name"), 404),
    ):
        assert call[0] == status
        assert set(call[1]["error"]) == {"message", "type", "param", "code"}
