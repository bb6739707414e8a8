"""The engine with a tiny random model: how requests end, fail, are preempted and are refused."""

import json
import shutil
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, RequestError
from engine.llm_engine import LLMEngine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import SchedulerConfig
from engine.structured_output import StructuredOutput
from tests.engine.tiny_models import make_tiny_model

pytestmark = pytest.mark.ispc
MAX_LEN = 128
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama without a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    make_tiny_model("llama3.1", path)
    return path


@pytest.fixture(scope="module")
def real_folder(folder: Path, default_model_folder: Path, tmp_path_factory) -> Path:
    """The same with a tokenizer, so that its weights can be used."""
    path = tmp_path_factory.mktemp("tiny-with-tokenizer")
    shutil.copytree(folder, path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_model_folder / name, path)
    return path


def make_engine(folder: Path, **options) -> LLMEngine:
    defaults = {
        "load_format": "dummy",
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "device_kv_blocks": 64,
        "threads": 1,
    }
    return LLMEngine(EngineConfig(model=str(folder), **{**defaults, **options}))


@pytest.fixture(scope="module")
def shared(folder: Path):
    engine = make_engine(folder)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: LLMEngine):
    """The module's engine, which every test must leave empty."""
    yield shared
    assert not shared.has_unfinished_requests()
    assert_empty(shared)


def assert_empty(engine: LLMEngine) -> None:
    engine.runner.pool.check_integrity()
    assert engine.runner.pool.num_used == 0
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0


def run(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Step to the end and return the last output of each request."""
    latest = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.request_id not in latest or not latest[output.request_id].finished
            latest[output.request_id] = output
        engine.runner.pool.check_integrity()
    return latest


def complete(engine: LLMEngine, prompt: list[int], params: SamplingParams) -> RequestOutput:
    engine.add_request("only", prompt, params)
    return run(engine)["only"]


PROMPTS = [[2 + (7 * row + 3 * i) % 190 for i in range(5 + 9 * row)] for row in range(6)]


def test_outputs_grow_by_one_token_and_say_when_they_end(engine: LLMEngine) -> None:
    engine.add_request("a", PROMPTS[0], GREEDY)
    lengths = []
    while engine.has_unfinished_requests():
        [output] = engine.step()
        lengths.append(len(output.outputs[0].token_ids))
        assert output.finished == (lengths[-1] == 12)
        assert output.outputs[0].finish_reason == ("length" if output.finished else None)
    assert lengths == list(range(1, 13))
    assert output.prompt is None
    assert output.prompt_token_ids == PROMPTS[0]
    assert output.outputs[0].text == ""
    times = output.metrics
    assert times.arrival_time_s <= times.first_scheduled_time_s <= times.first_token_time_s
    assert times.first_token_time_s <= times.finish_time_s
    assert times.ttft_s >= 0


def test_end_of_sequence_and_stop_tokens(engine: LLMEngine) -> None:
    bias_to = {token: SamplingParams(temperature=0, logit_bias={token: 100.0}) for token in (1, 9)}
    ended = complete(engine, PROMPTS[0], bias_to[1]).outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([1], "stop", None)
    params = SamplingParams(temperature=0, logit_bias={1: 100.0}, ignore_eos=True, max_tokens=3)
    ended = complete(engine, PROMPTS[0], params).outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([1, 1, 1], "length", None)
    params = SamplingParams(temperature=0, logit_bias={9: 100.0}, stop_token_ids=[9])
    ended = complete(engine, PROMPTS[0], params).outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([9], "stop", 9)
    params = SamplingParams(temperature=0, logit_bias={1: 100.0}, min_tokens=4)
    ended = complete(engine, PROMPTS[0], params).outputs[0]
    assert len(ended.token_ids) == 5
    assert 1 not in ended.token_ids[:4]


def test_the_context_ends_a_request_with_length(engine: LLMEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    prompt = [5] * (MAX_LEN - 3)
    ended = complete(engine, prompt, params).outputs[0]
    assert (len(ended.token_ids), ended.finish_reason) == (3, "length")
    longest = complete(engine, [5] * (MAX_LEN - 1), params).outputs[0]
    assert (len(longest.token_ids), longest.finish_reason) == (1, "length")


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], None, "the prompt is empty"),
        ([5] * MAX_LEN, None, r"has 128 tokens; with a context of 128 tokens it may have 127"),
        ([5, 199], None, "prompt token ids must be from 0 to 198"),
        ([-1], None, "prompt token ids must be from 0 to 198"),
        ("text", None, "a text prompt needs a tokenizer, and the model folder has none"),
        ([5], SamplingParams(stop="x"), "stop strings need a tokenizer"),
        (
            [5],
            SamplingParams(structured_output=StructuredOutput(regex="a")),
            "structured output needs a tokenizer",
        ),
        ([5], SamplingParams(logit_bias={199: 1.0}), "logit_bias token ids must be from 0 to 198"),
    ],
)
def test_refused_requests_leave_no_trace(engine: LLMEngine, prompt, params, message) -> None:
    with pytest.raises(RequestError, match=message):
        engine.add_request("bad", prompt, params)
    assert not engine.has_unfinished_requests()
    engine.add_request("bad", [5], GREEDY)  # the id is still free
    run(engine)


def test_an_id_may_be_used_again_only_after_its_end(engine: LLMEngine) -> None:
    engine.add_request("a", PROMPTS[0], GREEDY)
    with pytest.raises(RequestError, match="request id 'a' is already in use"):
        engine.add_request("a", PROMPTS[1], GREEDY)
    run(engine)
    engine.add_request("a", PROMPTS[1], GREEDY)
    assert run(engine)["a"].prompt_token_ids == PROMPTS[1]


def test_abort_frees_blocks_and_leaves_others_alone(engine: LLMEngine) -> None:
    alone = complete(engine, PROMPTS[1], GREEDY).outputs[0].token_ids
    for name, prompt in zip("abc", PROMPTS, strict=False):
        engine.add_request(name, prompt, GREEDY)
    for _ in range(4):
        engine.step()
    used = engine.runner.pool.num_used
    aborted = engine.abort_request("a")
    assert aborted.finished
    assert aborted.outputs[0].finish_reason == "abort"
    assert len(aborted.outputs[0].token_ids) == 4
    assert engine.runner.pool.num_used < used
    engine.runner.pool.check_integrity()
    engine.add_request("waiting", PROMPTS[3], GREEDY)
    assert engine.abort_request("waiting").outputs[0].token_ids == []
    assert engine.abort_request("a") is None
    assert engine.abort_request("never seen") is None
    finished = run(engine)
    assert set(finished) == {"b", "c"}
    assert finished["b"].outputs[0].token_ids == alone


class _DeviceError(Exception):
    pass


@pytest.mark.parametrize("method", ["launch", "finish"])
@pytest.mark.parametrize("error", [_DeviceError, KeyboardInterrupt])
def test_a_failing_step_fails_its_requests_and_the_engine_serves_on(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], method: str
) -> None:
    def fail(step):
        raise error

    engine.add_request("a", PROMPTS[0], GREEDY)
    engine.step()
    engine.add_request("b", PROMPTS[1], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, method, fail)
        with pytest.raises(error):
            engine.step()
    assert not engine.has_unfinished_requests()
    assert_empty(engine)
    assert len(complete(engine, PROMPTS[2], GREEDY).outputs[0].token_ids) == 12


def test_a_failing_launch_loses_nothing_of_the_step_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(folder, async_scheduling=True)
    # Its next token would need this one, so the step is taken in before the next is launched.
    short = SamplingParams(temperature=0, max_tokens=1, repetition_penalty=1.2, ignore_eos=True)
    engine.add_request("short", PROMPTS[0], short)
    engine.add_request("long", PROMPTS[1], GREEDY)
    assert engine.step() == []
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    finished = run(engine)
    assert set(finished) == {"short"}
    assert len(finished["short"].outputs[0].token_ids) == 1
    assert_empty(engine)
    engine.close()


def test_a_step_log_that_cannot_be_written_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    config = EngineConfig(
        model=str(folder), device="cpu", log_steps=tmp_path / "missing" / "steps.jsonl"
    )
    with pytest.raises(ConfigError, match="cannot write the step log"):
        LLMEngine(config, told.append)
    assert not told


def test_a_failing_step_spares_requests_that_were_not_part_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64)
    engine = make_engine(folder, scheduler=limits)
    engine.add_request("running", PROMPTS[0], GREEDY)
    engine.add_request("waiting", PROMPTS[1], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert set(run(engine)) == {"waiting"}
    assert_empty(engine)
    engine.close()


LONG_GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
SAMPLED = [
    SamplingParams(max_tokens=30, ignore_eos=True, seed=seed, top_p=0.9, presence_penalty=0.3)
    for seed in range(len(PROMPTS))
]


@pytest.mark.parametrize(
    "params", [[LONG_GREEDY] * len(PROMPTS), SAMPLED], ids=["greedy", "seeded"]
)
def test_preemption_changes_nothing(real_folder: Path, params) -> None:
    tokens = []
    for options in ({}, {"device_kv_blocks": 9}, {"device_kv_blocks": 9, "block_size": 32}):
        limits = SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=24, admission_lookahead=False
        )
        engine = make_engine(real_folder, load_format="auto", scheduler=limits, **options)
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(str(number), prompt, params[number])
        finished = run(engine)
        tokens.append([finished[str(n)].outputs[0].token_ids for n in range(len(PROMPTS))])
        if options == {"device_kv_blocks": 9}:
            assert engine.stats.num_preemptions > 0
            assert sum(o.metrics.num_preemptions for o in finished.values()) > 0
        assert_empty(engine)
        engine.close()
    assert tokens[1] == tokens[0]
    assert tokens[2] == tokens[0]


def test_seeded_requests_are_the_same_alone_and_in_company(folder: Path, engine: LLMEngine) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=11)
    alone = complete(engine, PROMPTS[2], params).outputs[0].token_ids
    for number, prompt in enumerate(PROMPTS):
        own = SamplingParams(max_tokens=20, ignore_eos=True)
        engine.add_request(str(number), prompt, params if number == 2 else own)
    assert run(engine)["2"].outputs[0].token_ids == alone


def test_every_adjustment_of_logits_works_on_the_model_s_own(engine: LLMEngine) -> None:
    """The model computes in inference mode, whose tensors are not to be changed outside of it."""
    params = SamplingParams(
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={7: -3.0},
        min_tokens=2,
        seed=1,
        max_tokens=4,
        logprobs=1,
    )
    engine.add_request("greedy", PROMPTS[1], GREEDY)
    assert len(complete(engine, PROMPTS[0], params).outputs[0].token_ids) >= 2


def test_logprobs_accompany_the_tokens(engine: LLMEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2)
    ended = complete(engine, PROMPTS[0], params).outputs[0]
    assert [entry.token_id for entry in ended.logprobs] == ended.token_ids
    assert all(entry.rank == 1 and len(entry.top) == 2 for entry in ended.logprobs)
    assert ended.cumulative_logprob == pytest.approx(sum(e.logprob for e in ended.logprobs))
    assert complete(engine, PROMPTS[0], GREEDY).outputs[0].logprobs is None


def test_dummy_weights_depend_on_the_seed_alone(folder: Path) -> None:
    def logprobs(seed: int) -> float:
        engine = make_engine(folder, seed=seed)
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5)
        output = complete(engine, PROMPTS[0], params)
        engine.close()
        return output.outputs[0].logprobs

    first = logprobs(1)
    assert logprobs(1) == first
    assert logprobs(2) != first


def test_real_weights_need_a_tokenizer_unless_they_are_dummies(folder: Path, tmp_path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_engine(tmp_path).close()
    with pytest.raises(CheckpointError):
        make_engine(tmp_path, load_format="auto")


def test_closing_twice_and_with_requests_left(folder: Path) -> None:
    engine = make_engine(folder)
    engine.add_request("a", PROMPTS[0], GREEDY)
    engine.step()
    engine.close()
    assert engine.runner.pool.num_used == 0
    engine.close()
