"""`neo generate`: what it prints where, for every kind of prompt."""

import io
import json
from pathlib import Path

import pytest

from neo_cli.generate import _engine_seed
from tests.cli.conftest import Neo

pytestmark = pytest.mark.ispc


def test_one_prompt_prints_its_text_alone(neo: Neo, tiny_options) -> None:
    result = neo("generate", *tiny_options, "Hello")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("\n")
    assert result.out.strip()


def test_json_and_statistics(neo: Neo, tiny_options) -> None:
    result = neo("generate", *tiny_options, "--json", "--stats", "--logprobs", 2, "Hello", "You")
    assert (result.code, result.err) == (0, "")
    first, second, stats = map(json.loads, result.out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("Hello", "You")
    assert first["finish_reason"] == "length"
    assert first["num_output_tokens"] == len(first["token_ids"]) == len(first["logprobs"]) == 8
    assert len(first["logprobs"][0]["top"]) == 2
    assert first["num_prompt_tokens"] > 1
    assert stats["stats"]["generated_tokens"] == 16
    plain = neo("generate", *tiny_options, "--stats", "Hello")
    assert plain.out.strip() == first["text"].strip()
    names = [line.split("  ")[0] for line in plain.err.splitlines()]
    assert names[:2] == ["model", "computed by"]
    assert "generated tokens" in names


def test_many_prompts_print_in_order(neo: Neo, tiny_options, tmp_path: Path) -> None:
    # Much longer first prompts, and one sequence at a time or all at once.
    prompts = ["long " * (60 - 8 * number) + str(number) for number in range(6)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts[:3]) + "\n\n" + "\r\n".join(prompts[3:]))
    together = neo("generate", *tiny_options, "--json", "--prompt-file", file)
    assert (together.code, together.err) == (0, "")
    lines = [json.loads(line) for line in together.out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    chunked = neo(
        *("generate", *tiny_options, "--json", "-f", file),
        *("--max-num-seqs", 2, "--max-num-batched-tokens", 16),
    )
    texts = [json.loads(line)["text"] for line in chunked.out.splitlines()]
    assert texts == [line["text"] for line in lines]
    plain = neo("generate", *tiny_options, *prompts)
    headers = [line for line in plain.out.splitlines() if line.startswith("[")]
    assert headers == [f"[{n}] {prompt}" for n, prompt in enumerate(prompts, start=1)]


def test_chat_is_the_default_and_raw_is_raw(neo: Neo, tiny_options) -> None:
    def num_prompt_tokens(*options: object) -> int:
        result = neo("generate", *tiny_options, "--json", *options, "Hello")
        assert result.code == 0, result.err
        return json.loads(result.out)["num_prompt_tokens"]

    raw, chat = num_prompt_tokens("--raw"), num_prompt_tokens()
    assert raw == 1
    assert chat > raw + 5
    assert num_prompt_tokens("--chat") == chat
    assert num_prompt_tokens("--system", "word " * 100) > 100


def test_jsonl_prompts(neo: Neo, tiny_options, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Hello"}]
    # A line separator that JSON leaves as it is; a byte order mark, as editors write it.
    values = ["one\u2028line", {"prompt": "Hello"}, {"messages": messages}, messages]
    text = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    file.write_text("\ufeff" + text, encoding="utf-8")
    result = neo("generate", *tiny_options, "--json", "-f", file)
    assert (result.code, result.err) == (0, "")
    lines = [json.loads(line) for line in result.out.split("\n") if line]
    assert [line["prompt"] for line in lines] == ["one\u2028line", "Hello", messages, messages]
    assert lines[1]["text"] == lines[2]["text"] == lines[3]["text"]


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input_is_one_prompt(neo: Neo, tiny_options, monkeypatch, arguments) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    result = neo("generate", *tiny_options, "--json", *arguments)
    assert result.code == 0, result.err
    assert json.loads(result.out)["prompt"] == "two\nlines"


def test_a_stop_string_and_a_bias(neo: Neo, tiny_options) -> None:
    bias = ["--logit-bias", "28=100"]
    result = neo("generate", *tiny_options, *bias, "--json", "Hello")
    token = json.loads(result.out)["text"][:1]
    stopped = neo("generate", *tiny_options, *bias, "--json", "--stop", token * 3, "Hello")
    found = json.loads(stopped.out)
    assert (found["text"], found["finish_reason"]) == ("", "stop")
    assert found["stop_reason"] == token * 3
    kept = neo(
        *("generate", *tiny_options, *bias, "--stop", token * 3, "--include-stop-str-in-output"),
        "Hello",
    )
    assert kept.out == token * 3 + "\n"


def test_a_seed_makes_sampling_the_same_each_time(neo: Neo, tiny_options) -> None:
    options = [*tiny_options, "--temperature", 1, "--seed", 5, "Hello"]
    assert neo("generate", *options).out == neo("generate", *options).out


def test_only_a_seed_does() -> None:
    assert _engine_seed(None, "auto") != _engine_seed(None, "auto")
    assert _engine_seed(None, "dummy") == 0  # dummy weights come from it
    assert _engine_seed(7, "auto") == _engine_seed(7, "dummy") == 7
