"""Every supported family against transformers: prefill and decode, chunked and not."""

from pathlib import Path

import pytest
import torch

from engine.backends import make_backend
from engine.batch import BatchBuilder
from engine.checkpoint import open_checkpoint
from engine.kv_blocks import BlockPool
from engine.model_config import ModelConfig
from engine.models import DecoderModel, load_weights
from engine.models.weights import allocate_weights
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledRequest, StepPlan
from tests.engine.tiny_models import FAMILIES, make_tiny_model

pytestmark = pytest.mark.ispc
NUM_PROMPT, NUM_DECODE = 150, 5
TOTAL = NUM_PROMPT + NUM_DECODE


def neo_logits(folder: Path, tokens: list[int], chunk: int, dtype: torch.dtype) -> torch.Tensor:
    """Return logits at the end of each chunk of the prompt, then after each decoded token."""
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_hf(checkpoint.config)
    backend = make_backend(torch.device("cpu"), 2)
    weights = allocate_weights(config, dtype, backend.device)
    load_weights(weights, checkpoint.tensors(backend.device))
    model = DecoderModel(config, weights, backend, max_model_len=TOTAL)
    pool = BlockPool(16, 16)
    backend.allocate_kv_cache(model.attention_shape(16), pool.num_blocks)
    builder = BatchBuilder(backend.device, pool)
    request = Request(
        request_id="r", prompt_token_ids=tokens, params=SamplingParams(), max_total_tokens=TOTAL
    )
    pool.grow("r", TOTAL)
    rows = []
    for start in range(0, NUM_PROMPT, chunk):
        share = ScheduledRequest(request, start, min(chunk, NUM_PROMPT - start))
        plan = StepPlan(prefills=[share])
        batch = builder.build(plan)
        wanted = torch.arange(share.num_tokens)
        rows.append(model.forward(replace_rows(batch, wanted)))
    for start in range(NUM_PROMPT, TOTAL):
        batch = builder.build(StepPlan(decodes=[ScheduledRequest(request, start, 1)]))
        rows.append(model.forward(replace_rows(batch, torch.tensor([0]))))
    backend.close()
    return torch.cat(rows)


def replace_rows(batch, rows: torch.Tensor):
    from dataclasses import replace

    return replace(batch, logits_rows=rows)


@pytest.mark.parametrize("chunk", [NUM_PROMPT, 37])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path: Path, family: str, chunk: int) -> None:
    reference = make_tiny_model(family, tmp_path)
    tokens = torch.randint(2, 199, (TOTAL,), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = reference.double()(tokens.unsqueeze(0)).logits[0]
        plain = reference.float()(tokens.unsqueeze(0)).logits[0]
    got = neo_logits(tmp_path, tokens.tolist(), chunk, torch.float32)
    tolerance = 2 * (plain - expected).abs().max().item() + 1e-5
    assert (got - expected).abs().max().item() <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama3.1", "qwen3"])
def test_half_precision_is_as_good_as_torch(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    reference = make_tiny_model(family, tmp_path, initializer_range=0.05)
    tokens = torch.randint(2, 199, (TOTAL,), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        plain = reference.to(dtype)(tokens.unsqueeze(0)).logits[0].float()
        # The reference computes in float32 on the same rounded weights.
        expected = reference.float()(tokens.unsqueeze(0)).logits[0]
    got = neo_logits(tmp_path, tokens.tolist(), 64, dtype)
    tolerance = 2 * (plain - expected).abs().max().item() + 1e-5
    assert (got - expected).abs().max().item() <= tolerance


def test_old_style_rope_config_is_read_the_same(tmp_path: Path) -> None:
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1234.0}}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1234.0}
    base = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 128,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    assert ModelConfig.from_hf(base | new) == ModelConfig.from_hf(base | old)
