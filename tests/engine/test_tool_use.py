"""Tools of chat requests: checks, chat templates, and forced calls of a real engine."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from engine.errors import ConfigError, RequestError
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from engine.structured_output import StructuredOutput
from engine.tool_calls import FORMATS, ToolUse, find_format
from tests.engine import chat_templates

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds numbers.",
        "parameters": {
            "type": "object",
            "properties": {"terms": {"type": "array", "items": {"$ref": "#/$defs/term"},
                                     "minItems": 2, "maxItems": 3}},
            "required": ["terms"],
            "additionalProperties": False,
            "$defs": {"term": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}  # fmt: skip
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [ADD, NOW]
NAMED = {"type": "function", "function": {"name": "add"}}
TEMPLATES = {
    "hermes": chat_templates.HERMES,
    "llama3_json": chat_templates.LLAMA3,
    "mistral": chat_templates.MISTRAL,
}
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]


def test_formats_are_found_by_their_templates() -> None:
    for name, template in TEMPLATES.items():
        assert find_format(template) is FORMATS[name]
    several = {"default": chat_templates.WITHOUT_TOOLS, "tool_use": chat_templates.HERMES}
    assert find_format(several) is FORMATS["hermes"]
    assert find_format({"default": chat_templates.HERMES}) is None
    assert find_format(None) is None
    assert find_format(chat_templates.WITHOUT_TOOLS) is None
    assert find_format(chat_templates.HERMES + "<function=") is None
    assert find_format(chat_templates.WITHOUT_TOOLS, "hermes") is FORMATS["hermes"]
    with pytest.raises(ConfigError, match="one of hermes, llama3_json, mistral, got none"):
        find_format(None, "none")


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (None, "required", "tool_choice needs tools"),
        ([5], "auto", r"tools\[0\] must be an object, got 5"),
        ([{"type": "code"}], "auto", r'tools\[0\].type must be "function", got "code"'),
        ([NOW, {"type": "function"}], "auto", r"tools\[1\].function must be an object, got null"),
        ([{"function": {"name": "a b"}}], "auto", r"tools\[0\].function.name must have .*\"a b\""),
        ([{"function": {"name": "a", "parameters": []}}], "auto", r"parameters must be a JSON"),
        ([NOW, NOW], "auto", "'now' more than once"),
        (TOOLS, "any", 'tool_choice must be "none", "auto", "required" or .* got \'any\''),
        (TOOLS, {"type": "function"}, "tool_choice must be"),
        (TOOLS, {"type": "function", "function": {"name": "sub"}}, "'sub', which is not among"),
    ],
)
def test_wrong_tools_are_named(tools, choice, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ToolUse.of(FORMATS["hermes"], tools, choice)


def test_requests_without_tools_need_no_format() -> None:
    assert ToolUse.of(None, None) is None
    assert ToolUse.of(None, [], "auto") is None
    assert ToolUse.of(None, TOOLS, "none") is None
    with pytest.raises(RequestError, match="chat template knows none"):
        ToolUse.of(None, TOOLS, "auto")


def test_only_one_thing_may_force_the_output() -> None:
    use = ToolUse.of(FORMATS["hermes"], TOOLS, "required")
    params = SamplingParams(structured_output=StructuredOutput(regex="a"))
    with pytest.raises(RequestError, match="tool_choice forces a call, and regex another form"):
        use.sampling_params(params)
    free = ToolUse.of(FORMATS["hermes"], TOOLS)
    assert free.sampling_params(params) is params
    assert not ToolUse.of(FORMATS["mistral"], TOOLS).sampling_params(params).skip_special_tokens


@pytest.fixture(scope="module")
def folder(default_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with Mistral's marker among its special tokens."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(default_model_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((default_model_folder / "config.json").read_text())
    changes = {"num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path):
    options = {"max_model_len": 512, "device_kv_blocks": 200, "seed": 1, "threads": 1}
    with LLM(str(folder), load_format="dummy", dtype="float32", **options) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The module's model, with the template of the test's parameter `name`."""
    template = TEMPLATES[request.getfixturevalue("name")]
    monkeypatch.setattr(shared.engine.tokenizer, "chat_template", template)
    return shared


@pytest.mark.ispc
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_show_tools_and_earlier_calls(llm: LLM, name: str) -> None:
    call = {"id": "123456789", "type": "function",
            "function": {"name": "add", "arguments": '{"terms": [2, 3]}'}}  # fmt: skip
    conversation = [
        {"role": "assistant", "content": "Hello.", "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, "2 + 3?"]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "123456789", "content": "5"},
    ]
    engine = llm.engine
    text = engine.tokenizer.decode(engine.chat_prompt(conversation, TOOLS))
    assert "What is\n2 + 3?" in text
    assert "Adds numbers." in text
    assert '{"terms": [2, 3]}' in text  # not a string inside a string
    assert "None" not in text
    assert text.count("Adds") == 1
    assert "Adds" not in engine.tokenizer.decode(engine.chat_prompt(conversation))


@pytest.mark.ispc
@pytest.mark.parametrize("name", ["hermes"])
def test_options_reach_the_template_and_nothing_else(llm: LLM, name: str) -> None:
    def text(**options: object) -> str:
        return llm.engine.tokenizer.decode(llm.engine.chat_prompt(QUESTION, **options))

    assert text().endswith("assistant\n")
    assert text(hurry=True).endswith("assistant\nQuick: ")
    assert text(add_generation_prompt=False).endswith("3?<|im_end|>\n")
    for reserved in ("chat_template", "tokenize", "tools"):
        with pytest.raises(RequestError, match=f"must not hold '{reserved}'"):
            text(**{reserved: "{{ 1 }}"})
    with pytest.raises(RequestError, match="the chat template refuses"):
        text(**{"self": 1})
    begun = [*QUESTION, {"role": "assistant", "content": "2 + 3 is"}]
    tokens = llm.engine.chat_prompt(begun, continue_final_message=True)
    assert llm.engine.tokenizer.decode(tokens).endswith("assistant\n2 + 3 is")


@pytest.mark.ispc
@pytest.mark.parametrize("name", ["hermes"])
@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hello", r"messages\[0\] must be an object"),
        ({"content": "x"}, r"messages\[0\].role must be a string"),
        ({"role": "user", "content": 5}, "content must be a string or a list of parts, got 5"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            r'messages\[0\].content\[0\].type "image_url" is not supported',
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "text must be a string, got null"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\].function must be an object"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]},
            "arguments is not JSON",
        ),
    ],
)
def test_wrong_messages_are_named(llm: LLM, name: str, message, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        llm.engine.chat_prompt([message])


def is_sum(arguments: dict) -> bool:
    [terms] = arguments.values()
    return 2 <= len(terms) <= 3 and all(0 <= term <= 9 for term in terms)


@pytest.mark.ispc
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls_are_calls(llm: LLM, name: str, choice) -> None:
    tool_format = find_format(llm.engine.tokenizer.chat_template)
    uses = [
        ToolUse.of(tool_format, TOOLS, choice, parallel_tool_calls=several)
        for several in (True, False)
    ]
    prompt = llm.engine.chat_prompt(QUESTION, uses[0].template_tools)
    ends = [2, *llm.engine.tokenizer.convert_tokens_to_ids(["]", "}]"])]
    wish = SamplingParams(temperature=0, max_tokens=200, logit_bias=dict.fromkeys(ends, 8.0))
    outputs = {0: [], 1: []}
    for output in llm.stream([prompt] * 2, [use.sampling_params(wish) for use in uses]):
        outputs[int(output.request_id) % 2].append(output.outputs[0])
    for use, own in zip(uses, outputs.values(), strict=True):
        parser, parsed = use.parser(), use.parser().parse(own[-1].text)
        streamed = [*[parser.feed(output.new_text) for output in own], parser.finish()]
        assert own[-1].finish_reason == "stop"
        assert parsed.content == "".join(news.content for news in streamed) == ""
        calls = parsed.merged_calls()
        pieces = [call.arguments for news in streamed for call in news.calls]
        assert "".join(pieces) == "".join(call.arguments for call in calls)
        assert len(calls) >= 1
        if choice is NAMED or use is uses[1]:
            assert len(calls) == 1
        for call in calls:
            arguments = json.loads(call.arguments)
            assert is_sum(arguments) if call.name == "add" else arguments == {}
            assert call.name == "add" or choice is not NAMED


@pytest.mark.ispc
@pytest.mark.parametrize("name", ["mistral"])
def test_a_marker_that_is_a_special_token_is_seen(llm: LLM, name: str) -> None:
    """Free to call or not; the tokens of a call are pushed by biases."""
    engine = llm.engine
    marker = engine.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    use = ToolUse.of(find_format(engine.tokenizer.chat_template), TOOLS)
    call = '[{"name": "now", "arguments": {}}]'
    grammar = StructuredOutput(grammar=f"start: <[{marker}]> {json.dumps(call)} <[2]>")
    params = use.sampling_params(SamplingParams(max_tokens=60, structured_output=grammar))
    [output] = llm.generate(engine.chat_prompt(QUESTION, use.template_tools), params)
    parsed = use.parser().parse(output.outputs[0].text)
    assert output.outputs[0].text == "[TOOL_CALLS]" + call  # and not its end-of-sequence token
    assert output.outputs[0].token_ids[-1] == 2
    assert parsed.content == ""
    assert [(c.name, c.arguments) for c in parsed.merged_calls()] == [("now", "{}")]


@pytest.mark.ispc
@pytest.mark.parametrize("name", ["hermes"])
def test_stop_tokens_are_no_text_unless_asked_for(llm: LLM, name: str) -> None:
    token = llm.engine.tokenize("stop")[0]
    options = {"temperature": 0, "logit_bias": {token: 100.0}, "stop_token_ids": [token]}
    for keep, text in ((False, ""), (True, "stop")):
        params = SamplingParams(**options, include_stop_str_in_output=keep)
        ended = llm.generate("x", params)[0].outputs[0]
        assert (ended.text, ended.token_ids, ended.stop_reason) == (text, [token], token)
