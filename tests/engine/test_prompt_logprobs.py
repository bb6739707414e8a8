"""Prompt log-probabilities equal those of transformers, however the prompt is computed."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import prompt_scoring
from engine.errors import RequestError
from engine.llm import LLM
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.tiny_models import make_tiny_model

pytestmark = pytest.mark.ispc
NUM_TOP = 3
PROMPTS = [[2 + (7 * row + 3 * i * i) % 190 for i in range(1 + 13 * row)] for row in range(7)]
SCORED = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, prompt_logprobs=NUM_TOP)
PLAIN = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(default_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model("llama3.1", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_model_folder / name, folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_llm(folder: Path, **options) -> LLM:
    defaults = {"dtype": "float32", "max_model_len": 128, "threads": 1}
    return LLM(str(folder), **{**defaults, **options})


def assert_scores(reference: PreTrainedModel, output: RequestOutput, tolerance: float) -> None:
    prompt = output.prompt_token_ids
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    first, *others = output.prompt_logprobs
    assert first is None
    assert [entry.token_id for entry in others] == prompt[1:]
    for entry, row in zip(others, expected, strict=False):
        own = row[entry.token_id].item()
        assert entry.logprob == pytest.approx(own, abs=tolerance)
        # Near ties may swap places.
        above = (row > own + tolerance).sum().item(), (row >= own - tolerance).sum().item()
        assert above[0] < entry.rank <= above[1]
        top = row.topk(NUM_TOP).values.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(top, abs=tolerance)
        for token_id, logprob in entry.top:
            assert logprob == pytest.approx(row[token_id].item(), abs=tolerance)


MODES = [
    pytest.param({}, id="one-batch"),
    pytest.param({"max_num_batched_tokens": 16, "max_num_seqs": 8}, id="chunked"),
    pytest.param({"device_kv_blocks": 9, "max_num_batched_tokens": 24, "max_num_seqs": 8,
                  "admission_lookahead": False}, id="preempted"),
    pytest.param({"device_kv_blocks": 12, "host_kv_gb": 0.02, "mode": "asymmetric",
                  "max_num_batched_tokens": 24, "max_num_seqs": 8}, id="asymmetric"),
    pytest.param({"device_kv_blocks": 2, "host_kv_gb": 0.02, "mode": "auto"}, id="on-the-host"),
]  # fmt: skip


@pytest.mark.parametrize("options", MODES)
def test_scores_equal_transformers(folder: Path, reference, options, monkeypatch) -> None:
    # Pieces of 5 rows, so that boundaries of pieces and of chunks fall differently.
    monkeypatch.setattr(prompt_scoring, "MAX_PIECE_BYTES", 5 * 199 * 4)
    params = [SCORED if row % 2 else PLAIN for row in range(len(PROMPTS))]
    with make_llm(folder, **options) as llm:
        outputs = llm.generate(PROMPTS, params)
        stats = llm.engine.stats
        if options.get("mode") == "asymmetric" or "host_kv_gb" in options:
            assert stats.rows["cprf"] > 0
        elif "device_kv_blocks" in options:
            assert stats.num_preemptions > 0
    for own, output in zip(params, outputs, strict=True):
        if own is PLAIN:
            assert output.prompt_logprobs is None
        else:
            assert_scores(reference, output, 2e-4)


def test_scores_do_not_change_what_is_generated(folder: Path) -> None:
    with make_llm(folder) as llm:
        scored = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, SCORED)]
        assert scored == [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PLAIN)]


def test_a_prompt_of_one_token_has_nothing_to_score(folder: Path) -> None:
    with make_llm(folder) as llm:
        [output] = llm.generate([5], SCORED)
    assert output.prompt_logprobs == [None]


def test_how_many_is_checked() -> None:
    with pytest.raises(RequestError, match="prompt_logprobs must be between 0 and 20, got 21"):
        SamplingParams(prompt_logprobs=21)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_batched_tokens": 64, "max_num_seqs": 8}, id="chunked"),
        pytest.param(
            {"device_kv_blocks": 20, "host_kv_gb": 0.5, "mode": "asymmetric"}, id="asymmetric"
        ),
    ],
)
def test_the_default_model_equals_transformers(default_model_folder: Path, options) -> None:
    reference = AutoModelForCausalLM.from_pretrained(default_model_folder, dtype=torch.float32)
    text = "The quick brown fox jumps over the lazy dog. Paris is the capital of France. " * 4
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=NUM_TOP)
    with LLM(str(default_model_folder), dtype="float32", **options) as llm:
        outputs = llm.generate([text, "Once upon a time,"], params)
    for output in outputs:
        assert_scores(reference.eval(), output, 1e-3)
