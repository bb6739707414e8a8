"""Structured output: what may be asked for, which tokens are allowed, and whole requests."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine.errors import RequestError
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from engine.structured_output import StructuredOutput
from engine.structured_output import compiler as compiler_module
from engine.structured_output.compiler import GrammarCompiler
from engine.structured_output.matcher import GrammarMatcher

VOCAB_SIZE = 49_160  # a few rows more than the tokenizer has tokens, as real heads have
EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99},
                  "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}  # fmt: skip
DATE = r"(Mon|Tue|Sun), \d{2}\.\d{2}\.20\d\d"
SUM = 'start: number (" + " number)~1..3\nnumber: /[1-9][0-9]{0,2}/'
CHOICES = ["red", "reddish", 'a "b"\n', "Grün 😀"]


def is_thing(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "sizes"]
        and isinstance(value["name"], str)
        and 1 <= len(value["sizes"]) <= 3
        and all(isinstance(size, int) and 0 <= size <= 99 for size in value["sizes"])
    )


FORMS = {
    "schema": (StructuredOutput(json_schema=SCHEMA), is_thing),
    "regex": (StructuredOutput(regex=DATE), lambda text: re.fullmatch(DATE, text)),
    "choice": (StructuredOutput(choice=CHOICES), lambda text: text in CHOICES),
    "grammar": (
        StructuredOutput(grammar=SUM),
        lambda text: re.fullmatch(r"[1-9]\d{0,2}( \+ [1-9]\d{0,2}){1,3}", text),
    ),
}


@pytest.fixture(scope="module")
def tokenizer(default_model_folder: Path):
    return AutoTokenizer.from_pretrained(default_model_folder)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB_SIZE, {EOS})


def allowed(matcher: GrammarMatcher) -> set[int]:
    mask = np.zeros(matcher.num_mask_bytes, dtype=np.uint8)
    matcher.write_mask(mask.ctypes.data)
    return set(np.nonzero(np.unpackbits(mask, bitorder="little"))[0].tolist())


def nested_schema(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "integer"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of json_schema, json_object, regex, choice, grammar, got none"),
        ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
        ({"json_object": True, "json_schema": {}}, "got json_schema and json_object"),
        ({"json_schema": "{nope"}, "json_schema is not JSON"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is not JSON"),
        ({"json_schema": '{"a":' * 9999 + "1" + "}" * 9999}, "json_schema is not JSON"),
        ({"json_schema": "[1]"}, r"json_schema must be an object, got \[1\]"),
        ({"json_schema": False}, "json_schema must be an object, got false"),
        ({"choice": "red"}, "choice must be a list of strings that are not empty, got 'red'"),
        ({"choice": []}, "choice must be a list"),
        ({"choice": ["a", ""]}, "choice must be a list"),
        ({"regex": ""}, "regex must be a string that is not empty"),
        ({"grammar": 7}, "grammar must be a string that is not empty, got 7"),
    ],
)
def test_wrong_forms_are_named(options, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StructuredOutput(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "(a"}, r"regex cannot be used: .*unclosed group$"),
        ({"grammar": "start: nothing"}, 'grammar cannot be used: .*unknown name: "nothing"'),
        ({"json_schema": {"type": "thing"}}, "json_schema cannot be used: .*thing"),
        ({"json_schema": {"enum": []}}, "json_schema cannot be used"),
        ({"json_schema": nested_schema(300)}, "json_schema cannot be used: recursion limit"),
        ({"json_schema": {"x-guidance": {"nope": 7}}}, "json_schema cannot be used"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema cannot be used"),
    ],
)
def test_invalid_grammars_are_refused(compiler: GrammarCompiler, options, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        compiler.matcher(StructuredOutput(**options))


def test_a_tokenizer_without_a_file_is_refused() -> None:
    with pytest.raises(RequestError, match=r"needs a tokenizer\.json"):
        GrammarCompiler(object(), 10, {1}).matcher(StructuredOutput(regex="a"))


def test_masks_allow_what_can_still_become_a_choice(compiler, tokenizer) -> None:
    """Token by token against a plain search through the vocabulary's texts."""
    by_bytes = {value: code for code, value in _byte_alphabet().items()}
    special = set(tokenizer.all_special_ids)
    texts = {
        token_id: bytes(by_bytes[letter] for letter in token)
        for token, token_id in tokenizer.get_vocab().items()
        if token_id not in special
    }
    options = [choice.encode() for choice in CHOICES]
    for choice in CHOICES:
        matcher, written = compiler.matcher(StructuredOutput(choice=CHOICES)), b""
        for token_id in tokenizer.encode(choice):
            rests = [o[len(written) :] for o in options if o.startswith(written)]
            expected = {i for i, t in texts.items() if any(rest.startswith(t) for rest in rests)}
            expected |= {EOS} if b"" in rests else set()
            found = allowed(matcher)
            if (
                len({rest[:1] for rest in rests}) == 1
            ):  # forced: the usual tokens of the text are enough
                assert token_id in found, written
                assert found <= expected, written
            else:
                assert found == expected, written
            matcher.accept(token_id)
            written += texts[token_id]
        assert matcher.is_finished == (choice != "red")
        assert matcher.error is None


def _byte_alphabet() -> dict[int, str]:
    """Return GPT-2's letters for bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + at) for at, byte in enumerate(others)}


def test_thousands_of_choices(compiler, tokenizer) -> None:
    choices = [f"code {number}" for number in range(5000)]
    matcher = compiler.matcher(StructuredOutput(choice=choices))
    for token_id in tokenizer.encode("code 4321"):
        assert token_id in allowed(matcher)
        matcher.accept(token_id)
    assert matcher.error is None
    assert matcher.is_finished


def test_blanks_in_json_are_bounded(compiler, tokenizer) -> None:
    blank = tokenizer.encode(" ")[0]
    matcher = compiler.matcher(StructuredOutput(json_object=True))
    matcher.accept(tokenizer.encode("{")[0])
    num_blanks = 0
    while blank in allowed(matcher):
        matcher.accept(blank)
        num_blanks += 1
    assert num_blanks == 64
    assert matcher.error is None


def test_compiled_grammars_are_kept_but_not_for_ever(compiler, monkeypatch) -> None:
    made = []

    def count(wanted: StructuredOutput) -> str:
        made.append(wanted)
        return grammar(wanted)

    grammar = compiler_module._grammar
    monkeypatch.setattr(compiler_module, "_grammar", count)
    monkeypatch.setattr(compiler_module, "MAX_CACHED_GRAMMARS", 2)
    first, second, third = (StructuredOutput(regex=f"kept{n}") for n in range(3))
    for wanted in (first, second, first, third, first, second):
        compiler.matcher(wanted)
    assert made == [first, second, third, second]


def test_one_matcher_does_not_move_another(compiler, tokenizer) -> None:
    wanted = StructuredOutput(choice=["ab"])
    one, other = compiler.matcher(wanted), compiler.matcher(wanted)
    before = allowed(other)
    one.accept(tokenizer.encode("a")[0])
    assert allowed(one) != before
    assert allowed(other) == before


# Whole requests, with a random model and a real vocabulary.


@pytest.fixture(scope="module")
def folder(default_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_model_folder / name, folder)
    config = json.loads((default_model_folder / "config.json").read_text())
    changes = {"num_hidden_layers": 1, "vocab_size": VOCAB_SIZE}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def make_llm(folder: Path, **options) -> LLM:
    defaults = {"max_model_len": 256, "device_kv_blocks": 200, "seed": 1, "threads": 1}
    return LLM(str(folder), load_format="dummy", dtype="float32", **{**defaults, **options})


@pytest.fixture(scope="module")
def llm(folder: Path):
    with make_llm(folder) as llm:
        yield llm


def mixed_params() -> list[SamplingParams]:
    """Every form, sampled hot and with penalties and truncation, between free requests."""
    params = []
    for seed in range(3):
        for wanted, _ in FORMS.values():
            own = {"structured_output": wanted, "seed": seed, "max_tokens": 120}
            params.append(SamplingParams(**own, temperature=1.5, repetition_penalty=1.1, top_k=40))
            params.append(SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    return params


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    """The tokens of `mixed_params`, each request alone."""
    return [
        llm.generate(f"Prompt {n}:", params)[0].outputs[0].token_ids
        for n, params in enumerate(mixed_params())
    ]


@pytest.mark.ispc
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one-batch"),
        pytest.param(
            {"admission_lookahead": False, "device_kv_blocks": 17, "max_num_seqs": 12},
            id="preempted",
        ),
        pytest.param(
            {"device_kv_blocks": 12, "host_kv_gb": 0.05, "mode": "asymmetric"}, id="asymmetric"
        ),
        pytest.param({"device_kv_blocks": 12, "host_kv_gb": 0.05, "mode": "overlap"}, id="overlap"),
        pytest.param({"device_kv_blocks": 12, "host_kv_gb": 0.05, "mode": "auto"}, id="auto"),
    ],
)
def test_every_output_has_its_form_in_every_mode(folder: Path, expected, options) -> None:
    params = mixed_params()
    with make_llm(folder, **options) as llm:
        outputs = llm.generate([f"Prompt {n}:" for n in range(len(params))], params)
        stats = llm.engine.stats
        if "device_kv_blocks" in options and options.get("mode") is None:
            assert stats.num_preemptions > 0
        kind = {"asymmetric": "cdec", "overlap": "rotating"}.get(str(options.get("mode")))
        assert kind is None or stats.rows[kind] > 0
    assert [output.outputs[0].token_ids for output in outputs] == expected
    checks = dict(FORMS.values())
    for output, own in zip(outputs, params, strict=True):
        [completion] = output.outputs
        if own.structured_output is None:
            assert completion.finish_reason == "length"
            continue
        assert completion.finish_reason == "stop", completion
        assert completion.stop_reason is None
        assert checks[own.structured_output](completion.text), completion.text


@pytest.mark.ispc
def test_length_may_cut_it_short(llm: LLM) -> None:
    wanted = StructuredOutput(json_schema=SCHEMA)
    params = SamplingParams(temperature=0, max_tokens=4, structured_output=wanted)
    ended = llm.generate("x", params)[0].outputs[0]
    assert ended.finish_reason == "length"
    assert len(ended.token_ids) == 4
    assert ended.text.startswith("{")


@pytest.mark.ispc
def test_the_end_comes_only_where_the_grammar_allows_it(llm: LLM) -> None:
    pushed = {"temperature": 0, "max_tokens": 9, "logit_bias": {EOS: 100.0}}
    wanted = StructuredOutput(regex="[ab]{3,9}")

    def complete(**options):
        params = SamplingParams(**pushed, structured_output=wanted, **options)
        return llm.generate("x", params)[0].outputs[0]

    ended = complete()
    assert re.fullmatch("[ab]{3,9}", ended.text)
    assert ended.token_ids[-1] == EOS
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    # The bias wants the end at once; a minimum length holds it back while there is another way.
    longer = complete(min_tokens=len(ended.token_ids) + 1)
    assert len(longer.token_ids) > len(ended.token_ids)
    # Where only the end is left, it comes, whatever else was asked for.
    assert complete(min_tokens=9, ignore_eos=True).finish_reason == "stop"


@pytest.mark.ispc
def test_logprobs_are_those_of_the_model(llm: LLM) -> None:
    wanted = StructuredOutput(choice=["yes", "no"])
    params = SamplingParams(temperature=0, logprobs=3, structured_output=wanted)
    guided = llm.generate("x", params)[0].outputs[0].logprobs[0]
    free = llm.generate("x", SamplingParams(temperature=0, logprobs=3))[0].outputs[0].logprobs[0]
    assert guided.top == free.top
    assert guided.rank > 1


@pytest.mark.ispc
def test_a_grammar_that_fails_half_way_ends_its_request_only(llm: LLM, monkeypatch) -> None:
    accept = GrammarMatcher.accept

    def wrong(self: GrammarMatcher, token_id: int) -> None:
        accept(self, 0)  # a token that no grammar allows

    monkeypatch.setattr(GrammarMatcher, "accept", wrong)
    params = SamplingParams(max_tokens=3, structured_output=StructuredOutput(regex="abc"))
    failed, free = llm.generate(["x", "y"], [params, SamplingParams(max_tokens=3, ignore_eos=True)])
    assert failed.outputs[0].finish_reason == "error"
    assert "structured output failed" in failed.outputs[0].stop_reason
    assert free.outputs[0].finish_reason == "length"
    assert llm.engine.runner.pool.num_used == 0


@pytest.mark.ispc
def test_a_bad_schema_leaves_no_trace(llm: LLM) -> None:
    params = SamplingParams(structured_output=StructuredOutput(regex="(a"))
    with pytest.raises(RequestError, match="unclosed group"):
        llm.engine.add_request("bad", "x", params)
    assert not llm.engine.has_unfinished_requests()


def test_what_needs_the_tokens_before() -> None:
    assert not SamplingParams(logit_bias={1: 2.0}, min_tokens=2, logprobs=1).needs_host_tokens
    assert SamplingParams(frequency_penalty=0.1).needs_host_tokens
    assert SamplingParams(structured_output=StructuredOutput(regex="a")).needs_host_tokens
