"""Every supported family against transformers: prefill and decode, chunked and not."""

from pathlib import Path

import pytest
import torch

from engine.model_config import ModelConfig
from tests.engine.neo_logits import neo_logits
from tests.engine.tiny_models import FAMILIES, make_tiny_model
from tests.markers import DEVICES

NUM_PROMPT, NUM_DECODE = 150, 5
TOTAL = NUM_PROMPT + NUM_DECODE


def random_tokens() -> torch.Tensor:
    return torch.randint(2, 199, (TOTAL,), generator=torch.Generator().manual_seed(7))


def reference_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.inference_mode():
        return model(tokens.unsqueeze(0).to(device)).logits[0].float().cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [NUM_PROMPT, 37])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path: Path, family: str, chunk: int, device: str) -> None:
    model = make_tiny_model(family, tmp_path).to(device)
    tokens = random_tokens()
    expected = reference_logits(model.double(), tokens)
    plain = reference_logits(model.float(), tokens)
    got = neo_logits(tmp_path, tokens.tolist(), NUM_PROMPT, chunk, torch.float32, device)
    tolerance = 2 * (plain - expected).abs().max().item() + 1e-5
    assert (got - expected).abs().max().item() <= tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5", "qwen3"])
def test_half_precision_is_as_good_as_torch(
    tmp_path: Path, family: str, dtype: torch.dtype, device: str
) -> None:
    model = make_tiny_model(family, tmp_path, initializer_range=0.05).to(device)
    tokens = random_tokens()
    plain = reference_logits(model.to(dtype), tokens)
    expected = reference_logits(model.float(), tokens)  # on the same, rounded weights
    got = neo_logits(tmp_path, tokens.tolist(), NUM_PROMPT, 64, dtype, device)
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
