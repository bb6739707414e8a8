"""`neo generate` with a form for the output, and how wrong forms are refused."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Neo

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.mark.ispc
def test_every_form_by_its_option(neo: Neo, tiny_options, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "sum.lark"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('start: "x" "+"\n')

    def text(*options: object) -> str:
        result = neo("generate", *tiny_options, "--max-tokens", 80, *options, "--json", "Hello")
        assert (result.code, result.err) == (0, "")
        printed = json.loads(result.out)
        assert printed["finish_reason"] == "stop"
        return printed["text"]

    assert set(json.loads(text("--json-schema", schema))) == {"ok"}
    assert set(json.loads(text("--json-schema", json.dumps(SCHEMA)))) == {"ok"}
    assert text("--choice", "yes", "--choice", "no") in ("yes", "no")
    assert text("--regex", "a{3}b") == "aaab"
    assert text("--grammar", grammar) == "x+"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--regex", "a", "--choice", "b"], 2, "exactly one of json_schema, json_object, regex"),
        (["--json-schema", "{"], 2, "json_schema is not JSON"),
        (["--json-schema", "/no/such/file"], 2, "cannot read /no/such/file"),
        (["--grammar", "/no/such/file"], 2, "cannot read /no/such/file"),
        (["--choice", ""], 2, "choice must be a list of strings that are not empty"),
        (["--regex", "(a"], 1, "regex cannot be used: "),
    ],
)
@pytest.mark.ispc
def test_wrong_forms_are_one_line(neo: Neo, tiny_options, options, code, message) -> None:
    result = neo("generate", *tiny_options, *options, "Hello")
    assert result.code == code
    assert message in result.error_line
