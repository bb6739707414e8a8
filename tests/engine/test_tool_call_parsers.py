"""Tool calls in text: every format, whole and in pieces, and text that only looks like calls."""

import random
import re

import pytest

from engine.tool_calls import FORMATS, Parsed

NAMES = ["get_weather", "add", "now"]
WEATHER = '{"city": "Zürich \\"{[", "days": [1, {"a": "}"}]}'

# format, text, content, calls
CASES = {
    "hermes-one": (
        "hermes",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>',
        "",
        [("get_weather", WEATHER)],
    ),
    "hermes-content-and-two": (
        "hermes",
        "Let me look.\n\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1, "b": -2.5e3}}\n</tool_call>\n<tool_call>\n'
        '{"arguments": {}, "name": "now"}\n</tool_call>\n',
        "Let me look.",
        [("add", '{"a": 1, "b": -2.5e3}'), ("now", "{}")],
    ),
    "hermes-content-behind": (
        "hermes",
        '<tool_call>{"name": "now"}</tool_call>\n\n Done <b> <tool',
        "Done <b> <tool",
        [("now", "{}")],
    ),
    "hermes-no-closing-tag": (
        "hermes",
        '<tool_call>{"name":"now","arguments":null} <tool_call>{"name":"add","arguments":{"a":1}}',
        "",
        [("now", "{}"), ("add", '{"a":1}')],
    ),
    "hermes-arguments-as-text": (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    "hermes-cut-in-arguments": (
        "hermes",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b',
        "",
        [("add", '{"a": 1, "b')],
    ),
    "hermes-not-json": ("hermes", "a <tool_call> is a tag", "a <tool_call> is a tag", []),
    "hermes-no-name": (
        "hermes",
        'x <tool_call>{"arguments": {"a": 1}}</tool_call> y',
        'x <tool_call>{"arguments": {"a": 1}}</tool_call> y',
        [],
    ),
    "hermes-cut-before-name": ("hermes", 'x\n<tool_call>{"na', 'x\n<tool_call>{"na', []),
    "hermes-content": ("hermes", "1 < 2 <tool \n", "1 < 2 <tool \n", []),
    "llama-one": (
        "llama3_json",
        f' \n{{"name": "get_weather", "parameters": {WEATHER}}}',
        "",
        [("get_weather", WEATHER)],
    ),
    "llama-tag-and-two": (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1}}; '
        '{"name": "now", "parameters": {}}\n',
        "",
        [("add", '{"a": 1}'), ("now", "{}")],
    ),
    "llama-json-answer": (
        "llama3_json",
        '{"name": "Ada", "parameters": {"born": 1815}}',
        '{"name": "Ada", "parameters": {"born": 1815}}',
        [],
    ),
    "llama-other-json": ("llama3_json", '{"a": [1, 2]} and', '{"a": [1, 2]} and', []),
    "llama-content": ("llama3_json", "\n It is {late}; go", "\n It is {late}; go", []),
    "llama-cut-tag": ("llama3_json", "<|python_t", "<|python_t", []),
    "llama-behind-a-call": (
        "llama3_json",
        '{"name": "now", "parameters": {}}; and then',
        "; and then",
        [("now", "{}")],
    ),
    "mistral-list": (
        "mistral",
        'Well [TOOL_CALLS] [{"name": "get_weather", "arguments": ' + WEATHER + "}, "
        '{"name": "now", "arguments": {}}]',
        "Well",
        [("get_weather", WEATHER), ("now", "{}")],
    ),
    "mistral-names": (
        "mistral",
        f'[TOOL_CALLS]get_weather{WEATHER}[TOOL_CALLS]add[CALL_ID]abc[ARGS]{{"a": [1]}} ok',
        "ok",
        [("get_weather", WEATHER), ("add", '{"a": [1]}')],
    ),
    "mistral-cut-list": (
        "mistral",
        '[TOOL_CALLS][{"name": "now", "arguments": {}}, ',
        "",
        [("now", "{}")],
    ),
    "mistral-cut-name": ("mistral", "[TOOL_CALLS]get_w", "[TOOL_CALLS]get_w", []),
    "mistral-not-json": ("mistral", "[TOOL_CALLS][nothing]", "[TOOL_CALLS][nothing]", []),
    "mistral-content": ("mistral", "a [TOOL_ b", "a [TOOL_ b", []),
}


def parse(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = FORMATS[name].make_parser(NAMES, False)
    parsed = Parsed()
    for piece in pieces:
        parsed += parser.feed(piece)
    parsed += parser.finish()
    calls = parsed.merged_calls()
    assert parser.num_calls == len(calls)
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return parsed.content, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("case", CASES)
def test_content_and_calls(case: str) -> None:
    name, text, content, calls = CASES[case]
    assert parse(name, [text]) == (content, calls)


@pytest.mark.parametrize("case", CASES)
def test_pieces_do_not_change_the_result(case: str) -> None:
    name, text, content, calls = CASES[case]
    assert parse(name, list(text)) == (content, calls)
    rng = random.Random(case)
    for _ in range(50):
        cuts = sorted(rng.sample(range(1, len(text)), rng.randint(1, min(8, len(text) - 1))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(name, pieces) == (content, calls), pieces


def test_news_come_as_soon_as_they_are_certain() -> None:
    parser = FORMATS["hermes"].make_parser(NAMES, False)
    assert parser.feed("Hm. ").content == "Hm."
    assert parser.feed("<tool_call>").calls == []
    assert parser.feed('{"name": "add"').calls[0].name == "add"
    assert [c.arguments for c in parser.feed(', "arguments": {"a": ').calls] == ['{"a": ']
    assert [c.arguments for c in parser.feed("1}").calls] == ["1}"]
    assert parser.feed("}</tool_call>") == Parsed()
    assert parser.finish() == Parsed()


@pytest.mark.parametrize(("name", "form"), [("hermes", "call_[0-9a-f]{24}"), ("mistral", r"\w{9}")])
def test_ids_have_the_form_that_templates_expect(name: str, form: str) -> None:
    text = {"hermes": CASES["hermes-one"][1], "mistral": CASES["mistral-list"][1]}[name]
    for call in FORMATS[name].make_parser(NAMES, False).parse(text).merged_calls():
        assert re.fullmatch(form, call.id)
