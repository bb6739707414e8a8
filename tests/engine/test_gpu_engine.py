"""The engine on a CUDA GPU: the embedded model against transformers, and a true 8B shape."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.engine.neo_logits import neo_logits
from tests.engine.prompts import PROMPTS
from tests.markers import GPU_MARKS
from workloads.model_shapes import model_shape_folder

pytestmark = list(GPU_MARKS)
NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
FLOAT32_TIE = 2e-4


@pytest.fixture(scope="module")
def prompts(default_model_folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    return [tokenizer.encode(text) for text in PROMPTS]


def load_reference(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda").eval()


def teacher_forced(model: torch.nn.Module, tokens: list[int], num_prompt: int) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([tokens], device="cuda")).logits
    return logits[0, num_prompt - 1 : -1].float().cpu()


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "one-batch"])
def test_float32_equals_transformers(default_model_folder, prompts, alone: bool) -> None:
    reference = load_reference(default_model_folder, torch.float32)
    with LLM(str(default_model_folder), dtype="float32", device="cuda") as llm:
        if alone:
            outputs = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
        else:
            outputs = llm.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        assert len(tokens) == NUM_TOKENS
        logits = teacher_forced(reference, prompt + tokens, len(prompt))
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert (logits.max(dim=-1).values - chosen).max().item() <= FLOAT32_TIE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_against_transformers(default_model_folder, prompts, dtype) -> None:
    """Logits within the two-times rule; another token only where two are within rounding."""
    name = str(dtype).removeprefix("torch.")
    with LLM(str(default_model_folder), dtype=name, device="cuda") as llm:
        outputs = llm.generate(prompts, GREEDY)
    half = load_reference(default_model_folder, dtype)
    exact = load_reference(default_model_folder, dtype).float()
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        plain = teacher_forced(half, prompt + tokens, len(prompt))
        expected = teacher_forced(exact, prompt + tokens, len(prompt))
        rounding = 2 * (plain - expected).abs().max().item() + 1e-5
        folder = default_model_folder
        got = neo_logits(folder, prompt + tokens, len(prompt), 4096, dtype, "cuda")
        got = got[len(prompt) - 1 : -1]
        assert (got - expected).abs().max().item() <= rounding
        chosen = expected.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert (expected.max(dim=-1).values - chosen).max().item() <= 2 * rounding


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"admission_lookahead": False, "device_kv_blocks": 40, "mode": "gpu-only"},
            id="preempted",
        ),
        pytest.param(
            {"device_kv_blocks": 60, "host_kv_gb": 1.0, "mode": "asymmetric"}, id="asymmetric"
        ),
        pytest.param({"device_kv_blocks": 60, "host_kv_gb": 1.0, "mode": "auto"}, id="auto"),
        pytest.param({"max_num_seqs": 16, "max_num_batched_tokens": 31}, id="chunked"),
    ],
)
def test_modes_and_limits_give_the_same(default_model_folder, prompts, options) -> None:
    folder = str(default_model_folder)
    with LLM(folder, dtype="float32", device="cuda") as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    with LLM(folder, dtype="float32", device="cuda", **options) as llm:
        outputs = llm.generate(prompts, GREEDY)
        assert llm.engine.runner.pool.num_used == 0
        if options.get("mode") == "gpu-only":
            assert llm.engine.stats.num_preemptions > 0
        if options.get("mode") == "asymmetric":
            assert llm.engine.stats.rows["cdec"] > 0
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_sampling_is_reproducible(default_model_folder, prompts) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=3, max_tokens=32)
    with LLM(str(default_model_folder), dtype="float32", device="cuda") as llm:
        together = [output.outputs[0].token_ids for output in llm.generate(prompts[:6], params)]
        alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts[:6]]
    assert together == alone


@pytest.fixture(scope="module")
def big_shape() -> str:
    return str(model_shape_folder("llama-3-8b"))


def test_8b_shape_generates(big_shape: str) -> None:
    options = {"load_format": "dummy", "device": "cuda", "max_model_len": 4096}
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with LLM(big_shape, **options) as llm:
        prompts = [[(17 * i + j) % 128_000 for j in range(100 + i)] for i in range(256)]
        for num_prompts in (1, 24, 256):
            outputs = llm.generate(prompts[:num_prompts], params)
            assert [len(output.outputs[0].token_ids) for output in outputs] == [16] * num_prompts
        assert llm.engine.runner.pool.num_used == 0


def test_chunked_long_prompt_equals_unchunked(big_shape: str, tmp_path: Path) -> None:
    """30,000 tokens through 4 layers of the 8B shape in float32."""
    import json

    config = json.loads((Path(big_shape) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    prompt = [(31 * i) % 128_000 for i in range(30_000)]
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=20, ignore_eos=True)
    found = []
    for max_num_batched_tokens in (30_016, 2048):
        with LLM(
            str(tmp_path),
            load_format="dummy",
            dtype="float32",
            device="cuda",
            max_model_len=30_100,
            max_num_batched_tokens=max_num_batched_tokens,
        ) as llm:
            found.append(llm.generate(prompt, params)[0].outputs[0])
    whole, chunked = found
    assert chunked.token_ids == whole.token_ids
    for a, b in zip(whole.logprobs, chunked.logprobs, strict=True):
        assert dict(a.top).keys() == dict(b.top).keys()
        assert all(abs(dict(b.top)[t] - logprob) < 1e-3 for t, logprob in a.top)


def test_too_little_gpu_memory_says_what_to_lower(big_shape: str) -> None:
    from engine.errors import CapacityError

    with pytest.raises(CapacityError, match="gpu-memory-utilization"):
        LLM(big_shape, load_format="dummy", device="cuda", gpu_memory_utilization=0.05)
    with pytest.raises(CapacityError, match="device-kv-blocks"):
        LLM(big_shape, load_format="dummy", device="cuda", device_kv_blocks=10**7)
