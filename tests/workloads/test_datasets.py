import json
import random
import statistics
from pathlib import Path

import pytest

from engine.errors import ConfigError, NeoError
from workloads.datasets import DatasetConfig, PromptMaker, load_workload
from workloads.datasets.load import check_trace_arrivals

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:47.1805900,12,3
"""


@pytest.fixture(scope="module")
def tokenizer(default_model_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_model_folder)


def config(name: str, path: Path | None = None, **options) -> DatasetConfig:
    return DatasetConfig(dataset_name=name, dataset_path=path and str(path), **options)


def lengths(found) -> list[tuple[int, int]]:
    return [(r.num_prompt_tokens, r.num_output_tokens) for r in found.requests]


def test_synthetic_is_uniform_around_its_means_and_reproducible() -> None:
    options = config("synthetic", num_prompts=500, input_len=1000, output_len=200, seed=3)
    pairs = lengths(load_workload(options, None))
    prompts, outputs = zip(*pairs, strict=True)
    assert 900 <= min(prompts) < max(prompts) <= 1100
    assert 180 <= min(outputs) < max(outputs) <= 220
    assert statistics.mean(prompts) == pytest.approx(1000, rel=0.01)
    assert pairs == lengths(load_workload(options, None))
    other = config("random", num_prompts=500, input_len=1000, output_len=200, seed=4)
    assert pairs != lengths(load_workload(other, None))


def test_summarize_has_the_published_distribution() -> None:
    found = load_workload(config("summarize", num_prompts=20_000), None)
    prompts, outputs = (sorted(values) for values in zip(*lengths(found), strict=True))
    assert statistics.mean(prompts) == pytest.approx(372.5, rel=0.01)
    assert statistics.mean(outputs) == pytest.approx(45.3, rel=0.01)
    assert statistics.stdev(outputs) == pytest.approx(8.9, rel=0.05)
    assert statistics.stdev(prompts) == pytest.approx(103.7, rel=0.05)
    assert prompts[10_000] == pytest.approx(371, abs=3)
    assert outputs[18_000] == pytest.approx(56, abs=1)
    correlation = statistics.correlation(*zip(*lengths(found), strict=True))
    assert correlation == pytest.approx(0.115, abs=0.03)
    assert "published" in found.source


def test_token_prompts_have_their_length_and_avoid_the_first_ids() -> None:
    maker = PromptMaker(as_text=False, vocab_size=1000)
    found = load_workload(config("summarize", num_prompts=20), maker).requests
    for request in found:
        assert len(request.prompt_token_ids) == request.num_prompt_tokens
        assert 10 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < 1000
    again = load_workload(config("summarize", num_prompts=20), maker).requests
    assert [r.prompt for r in again] == [r.prompt for r in found]


def test_text_prompts_are_read_as_that_many_tokens(tokenizer) -> None:
    maker = PromptMaker(as_text=True, tokenizer=tokenizer)
    options = config("synthetic", num_prompts=10, input_len=100)
    for request in load_workload(options, maker).requests:
        assert isinstance(request.prompt, str)
        assert maker.count(request.prompt) == request.num_prompt_tokens
        assert abs(request.num_prompt_tokens - 100) <= 12


def test_text_without_a_tokenizer_is_words() -> None:
    text, count = PromptMaker(as_text=True).random_prompt(7, random.Random(0))
    assert isinstance(text, str)
    assert len(text.split()) == count == 7


def test_azure_traces_give_arrivals_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    found = load_workload(config("azure-code", path, num_prompts=3), None)
    assert lengths(found) == [(374, 44), (12, 3), (396, 109)]
    assert check_trace_arrivals(found.requests) == pytest.approx([0.0, 0.5, 4.314579])


def test_a_trace_that_had_to_be_repeated_has_no_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    found = load_workload(config("azure-conv", path, num_prompts=8), None)
    assert len(found.requests) == 8
    with pytest.raises(ConfigError, match="no-oversample"):
        check_trace_arrivals(found.requests)
    short = load_workload(config("azure-conv", path, num_prompts=8, no_oversample=True), None)
    assert len(short.requests) == 3
    with pytest.raises(ConfigError, match="azure"):
        check_trace_arrivals(load_workload(config("synthetic", num_prompts=2), None).requests)


def test_lengths_file_keeps_its_order_and_an_output_length_overrides(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text("[[5, 6], [7, 8], [9, 10]]")
    assert lengths(load_workload(config("lengths", path, num_prompts=2), None)) == [(5, 6), (7, 8)]
    found = load_workload(config("lengths", path, num_prompts=3, output_len=4), None)
    assert lengths(found) == [(5, 4), (7, 4), (9, 4)]


def test_sharegpt_takes_two_turns_and_leaves_out_what_vllm_leaves_out(tmp_path, tokenizer) -> None:
    def talk(*turns: str) -> dict:
        return {"conversations": [{"from": "x", "value": turn} for turn in turns]}

    path = tmp_path / "sharegpt.json"
    good = talk("Name three colours, please.", "Red and green and blue.", "Thanks")
    path.write_text(
        json.dumps([talk("alone, without an answer"), good, talk("Hi", "Hello to you, too.")])
    )
    maker = PromptMaker(as_text=True, tokenizer=tokenizer)
    found = load_workload(config("sharegpt", path, num_prompts=1), maker).requests
    assert [r.prompt for r in found] == ["Name three colours, please."]
    assert found[0].num_prompt_tokens == maker.count("Name three colours, please.")
    assert found[0].num_output_tokens == maker.count("Red and green and blue.")


def test_custom_lines_go_through_the_chat_template(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "custom.jsonl"
    path.write_text('{"prompt": "Say hello", "output_tokens": 9}\n\n{"prompt": "Say bye"}\n')
    maker = PromptMaker(as_text=True, tokenizer=tokenizer)
    options = {"num_prompts": 2, "disable_shuffle": True}
    plain = load_workload(config("custom", path, skip_chat_template=True, **options), maker)
    assert [r.prompt for r in plain.requests] == ["Say hello", "Say bye"]
    assert [r.num_output_tokens for r in plain.requests] == [9, 256]
    chat = load_workload(config("custom", path, **options), maker).requests
    assert "Say hello" in chat[0].prompt
    assert chat[0].prompt.rstrip().endswith("assistant")
    as_tokens = load_workload(
        config("custom", path, **options), PromptMaker(as_text=False, tokenizer=tokenizer)
    )
    assert tokenizer.decode(as_tokens.requests[0].prompt_token_ids) == chat[0].prompt


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_summarize_reads_the_comparisons(tmp_path: Path, tokenizer, kind: str) -> None:
    import pandas

    rows = pandas.DataFrame({"prompt": ["a long text"] * 3, "chosen": ["short words"] * 3})
    path = tmp_path / f"part.{kind}"
    if kind == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=True)
    maker = PromptMaker(as_text=True, tokenizer=tokenizer)
    found = load_workload(config("summarize", path, num_prompts=2), maker).requests
    assert [r.prompt for r in found] == ["a long text"] * 2
    assert found[0].num_output_tokens == maker.count("short words")


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "custom.jsonl"
    path.write_text('{"prompt": "Say hello"}\n')
    with pytest.raises(NeoError, match="--tokenizer"):
        load_workload(config("custom", path), PromptMaker(as_text=True))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("lengths", "{", "line 1"),
        ("lengths", "[]", "expected a JSON list"),
        ("lengths", "[[1, 2], [3]]", "entry 1"),
        ("lengths", "[[1, 0]]", "at least 1, got 0"),
        ("lengths", "[[1, true]]", "got True"),
        ("azure-code", "a,b\n1,2\n", "TIMESTAMP"),
        ("azure-code", TRACE.splitlines()[0] + "\n", "no requests"),
        ("azure-code", TRACE + "yesterday,1,1\n", "line 5: expected a time stamp"),
        ("azure-code", TRACE + "2023-11-16 18:15:46,many,1\n", "line 5"),
        ("sharegpt", '{"a": 1}', "list of conversations"),
        ("sharegpt", "[3]", "entry 0"),
        ("sharegpt", '[{"conversations": [{}, {}]}]', 'lacks its "value"'),
        ("sharegpt", '[{"conversations": []}]', "no conversation"),
        ("custom", '{"prompt": ""}', "line 1"),
        ("custom", '{"prompt": "a"}\n{oh', "line 2 is not JSON"),
        ("custom", "\n", "no prompts"),
    ],
)
def test_malformed_files_say_where(tmp_path: Path, name: str, content: str, says: str) -> None:
    path = tmp_path / "broken"
    path.write_text(content)
    with pytest.raises(NeoError, match=says) as error:
        load_workload(config(name, path), None)
    assert str(path) in str(error.value)


def test_unreadable_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(NeoError, match="cannot be read"):
        load_workload(config("lengths", tmp_path / "none"), None)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(NeoError, match="UTF-8"):
        load_workload(config("lengths", binary), None)
    table = tmp_path / "rows.jsonl"
    table.write_text('{"prompt": "a"}\n')
    with pytest.raises(NeoError, match="chosen"):
        load_workload(config("summarize", table), None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset_name": "unknown"}, "dataset_name"),
        ({"num_prompts": 0}, "num_prompts"),
        ({"output_len": 0}, "output_len"),
        ({"range_ratio": 1.0}, "range_ratio"),
        ({"dataset_name": "custom"}, "--dataset-path"),
    ],
)
def test_options_are_checked(options: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DatasetConfig(**options)
