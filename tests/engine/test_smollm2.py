"""The embedded model through NEO's own kernels equals Hugging Face transformers, token for token.

Greedy decoding is checked by one forward pass of transformers over prompt and output: if each
output token is the argmax after all tokens before it, then greedy decoding gives that output.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.engine.prompts import PROMPTS

NUM_TOKENS = 64
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
TIE = 2e-4
"""Logits closer than this are a tie in float32 over 30 layers; whichever is taken is right."""

pytestmark = pytest.mark.ispc


@pytest.fixture(scope="module")
def reference(default_model_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(default_model_folder, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(default_model_folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    return [tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def llm(default_model_folder: Path) -> Iterator[LLM]:
    with LLM(str(default_model_folder), dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def together(llm: LLM, prompts) -> list[list[int]]:
    """All prompts in one batch."""
    return [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS)]


def assert_greedy(reference, prompt: list[int], output: list[int]) -> None:
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output).unsqueeze(1)).squeeze(1)
    behind = logits.max(dim=-1).values - chosen
    assert behind.max().item() <= TIE, f"first difference at {int(behind.argmax())}"


@pytest.mark.slow
def test_equals_transformers(reference, prompts, together) -> None:
    for prompt, output in zip(prompts, together, strict=True):
        assert len(output) == NUM_TOKENS
        assert_greedy(reference, prompt, output)


@pytest.mark.slow
def test_alone_equals_together(llm: LLM, prompts, together) -> None:
    for prompt, expected in list(zip(prompts, together, strict=True))[::4]:
        assert llm.generate(prompt, PARAMS)[0].outputs[0].token_ids == expected


def test_equals_transformers_own_generate(reference, prompts, together) -> None:
    """Up to the end-of-sequence token, where transformers stops and `ignore_eos` goes on."""
    eos = reference.generation_config.eos_token_id
    for index in (0, 2, 13):
        generated = reference.generate(
            torch.tensor([prompts[index]]),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            pad_token_id=eos,
        )
        expected = generated[0, len(prompts[index]) :].tolist()
        assert together[index][: len(expected)] == expected
        assert len(expected) == NUM_TOKENS or expected[-1] == eos


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_seqs": 16, "max_num_batched_tokens": 31}, id="chunked"),
        pytest.param(
            {"admission_lookahead": False, "device_kv_blocks": 40, "block_size": 16}, id="preempted"
        ),
        pytest.param(
            {"device_kv_blocks": 60, "host_kv_gb": 0.5, "mode": "asymmetric"}, id="asymmetric"
        ),
    ],
)
def test_limits_and_modes_change_nothing(default_model_folder, prompts, together, options) -> None:
    with LLM(str(default_model_folder), dtype="float32", **options) as llm:
        outputs = llm.generate(prompts, PARAMS)
        assert [output.outputs[0].token_ids for output in outputs] == together
        if options.get("mode") == "asymmetric":
            assert llm.engine.stats.rows["cdec"] > 0
        elif "device_kv_blocks" in options:
            assert llm.engine.stats.num_preemptions > 0
        llm.engine.runner.pool.check_integrity()
        assert llm.engine.runner.pool.num_used == 0


@pytest.mark.slow
def test_rotating_changes_nothing(default_model_folder, prompts, together) -> None:
    """A few of the prompts: a rotating token takes 31 steps."""
    options = {"device_kv_blocks": 12, "max_model_len": 192, "host_kv_gb": 0.5, "mode": "overlap"}
    with LLM(str(default_model_folder), dtype="float32", **options) as llm:
        outputs = llm.generate(prompts[::7], PARAMS)
        assert [output.outputs[0].token_ids for output in outputs] == together[::7]
        assert llm.engine.stats.rows["rotating"] > 0
        assert llm.engine.runner.pool.num_used == llm.engine.runner.host_pool.num_used == 0


def test_chat_answers_with_text(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [output] = llm.chat(question, SamplingParams(temperature=0, max_tokens=32))
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None
