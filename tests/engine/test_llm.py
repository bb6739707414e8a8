"""The offline API, with a random model and a real tokenizer."""

import json
import shutil
import weakref
from pathlib import Path

import pytest

from engine.errors import RequestError
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.engine.tiny_models import make_tiny_model

pytestmark = pytest.mark.ispc
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def shared(default_model_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A small random model with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (default_model_folder / name).is_file():
            shutil.copy(default_model_folder / name, folder)
    config = json.loads((default_model_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    options = {"max_model_len": 256, "device_kv_blocks": 200, "seed": 1, "threads": 1}
    with LLM(str(folder), load_format="dummy", dtype="float32", **options) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM):
    yield shared
    assert not shared.engine.has_unfinished_requests()
    assert shared.engine.runner.pool.num_used == 0
    shared.engine.runner.pool.check_integrity()


def test_one_text_one_list_of_tokens_or_several(llm: LLM) -> None:
    text = "The capital of France is"
    tokens = llm.engine.tokenize(text)
    [by_text] = llm.generate(text, GREEDY)
    [by_tokens] = llm.generate(tokens, GREEDY)
    several = llm.generate([text, tokens, "Once"], GREEDY)
    assert by_text.prompt == text
    assert by_tokens.prompt is None
    assert by_text.prompt_token_ids == by_tokens.prompt_token_ids == tokens
    expected = by_text.outputs[0].token_ids
    assert by_tokens.outputs[0].token_ids == expected
    assert [o.outputs[0].token_ids == expected for o in several] == [True, True, False]
    assert several[2].prompt == "Once"
    assert llm.generate([], GREEDY) == []


def test_one_parameter_set_for_all_or_one_each(llm: LLM) -> None:
    own = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    outputs = llm.generate(["a", "b", "c"], own)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    with pytest.raises(RequestError, match="3 prompts, 2 given"):
        llm.generate(["a", "b", "c"], own[:2])


def test_one_bad_prompt_and_nothing_is_generated(llm: LLM) -> None:
    before = llm.engine.stats.num_steps
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(["fine", ""], GREEDY)
    with pytest.raises(RequestError, match="a lone surrogate at character 1"):
        llm.generate(["fine", "x\ud800"], GREEDY)
    assert llm.engine.stats.num_steps == before


def test_leaving_a_stream_aborts_what_is_left(llm: LLM) -> None:
    stream = llm.stream(["one", "two", "three"], GREEDY)
    for _ in range(5):
        assert not next(stream).finished
    assert llm.engine.runner.pool.num_used > 0
    stream.close()
    assert not llm.engine.has_unfinished_requests()


def test_pieces_of_a_stream_are_the_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = list(llm.stream("Emoji: 😀 😃", params))
    assert "".join(o.outputs[0].new_text for o in outputs) == outputs[-1].outputs[0].text
    assert [o.finished for o in outputs] == [False] * 23 + [True]


def test_requests_of_the_engine_s_own_user_do_not_disturb(llm: LLM) -> None:
    llm.engine.add_request("mine", "One, two,", SamplingParams(max_tokens=40, ignore_eos=True))
    [output] = llm.generate("The capital of France is", GREEDY)
    assert output.finished
    assert llm.engine.abort_request("mine").outputs[0].token_ids


def test_a_stop_string_cuts_the_text(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    whole = llm.generate("1, 2, 3, 4,", plain)[0].outputs[0].text
    stop = whole[9:12]
    cut = whole[: whole.index(stop)]
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=30, stop=stop, include_stop_str_in_output=include
        )
        streamed = list(llm.stream("1, 2, 3, 4,", params))
        ended = streamed[-1].outputs[0]
        assert ended.text == cut + (stop if include else "")
        assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
        assert "".join(o.outputs[0].new_text for o in streamed) == ended.text


def test_a_stop_string_in_the_last_token_counts_as_stop(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    whole = llm.generate("1, 2, 3, 4,", plain)[0].outputs[0].text
    params = SamplingParams(temperature=0, max_tokens=6, stop=whole[-1])
    ended = llm.generate("1, 2, 3, 4,", params)[0].outputs[0]
    assert ended.finish_reason == "stop"
    assert ended.stop_reason == whole[-1]


def test_what_waits_for_a_stop_string_is_shown_at_the_end(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    whole = llm.generate("1, 2, 3, 4,", plain)[0].outputs[0].text
    params = SamplingParams(temperature=0, max_tokens=6, stop=whole[-2:] + "never")
    streamed = list(llm.stream("1, 2, 3, 4,", params))
    assert streamed[-1].outputs[0].text == whole
    assert streamed[-2].outputs[0].text != whole


def test_conversations(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [alone] = llm.chat(question, GREEDY)
    both = llm.chat([question, [{"role": "user", "content": "Say hello."}]], GREEDY)
    assert both[0].outputs[0].text == alone.outputs[0].text
    with pytest.raises(RequestError, match="the chat template refuses the messages"):
        llm.chat([{"role": "user"}], GREEDY)


def test_closing_gives_the_memory_back_whoever_holds_on_to_it(tmp_path: Path) -> None:
    make_tiny_model("llama3.1", tmp_path)
    options = {"load_format": "dummy", "device": "cpu", "max_model_len": 32, "threads": 1}
    with LLM(str(tmp_path), **options) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        embedding = weakref.ref(llm.engine.runner._model.weights.embedding)
        assert embedding() is not None
    assert llm.engine is not None
    assert embedding() is None
