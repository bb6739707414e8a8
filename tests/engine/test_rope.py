"""Rotary tables against transformers' own functions, and scalings that NEO does not have."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.errors import CheckpointError
from engine.rope import RopeConfig

CPU = torch.device("cpu")
CASES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
        "rope_theta": 5e5,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 1e6,
    },
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "rope_theta": 1e4,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.25,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 1e4,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
]


def read(parameters: dict[str, Any], head_dim: int = 64, positions: int = 2048) -> RopeConfig:
    return RopeConfig.from_hf({"rope_parameters": parameters}, head_dim, positions)


def reference_table(parameters: dict[str, Any], head_dim: int, length: int) -> torch.Tensor:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters=dict(parameters),
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(length).unsqueeze(0))
    half = head_dim // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("parameters", CASES, ids=lambda p: f"{p['rope_type']}-{len(p)}")
def test_table_equals_transformers(parameters, head_dim: int) -> None:
    table = read(parameters, head_dim).cos_sin_cache(700, CPU)
    assert table.shape == (700, head_dim)
    assert table.dtype == torch.float32
    expected = reference_table(parameters, head_dim, 700)
    # Angles of up to 700 in float32 are exact to 4e-5.
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [100, 2048, 2049, 5000])
def test_dynamic_equals_transformers_at_the_longest_length(length: int) -> None:
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = read(parameters)
    assert config.max_positions == 8192
    table = config.cos_sin_cache(length, CPU)
    expected = reference_table(parameters, 64, length)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6 * length + 1e-5)


@pytest.mark.parametrize(
    ("parameters", "max_positions"),
    [
        ({"rope_type": "default"}, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}, 2048),
    ],
)
def test_longest_context(parameters, max_positions: int) -> None:
    assert read(parameters).max_positions == max_positions


def test_old_and_new_style_and_nothing() -> None:
    old = {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 5}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}
    assert RopeConfig.from_hf(old, 64, 99) == RopeConfig.from_hf(new, 64, 99)
    none = RopeConfig.from_hf({"rope_scaling": None}, 64, 99)
    assert (none.rope_type, none.theta, none.max_positions) == ("default", 10000.0, 99)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ({"rope_parameters": {"type": "su"}}, "'su'"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor 0.5'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "'partial_rotary_factor 0.25'"),
    ],
)
def test_unsupported_kinds_list_the_supported_ones(config, found: str) -> None:
    with pytest.raises(CheckpointError, match=f"{found} is not supported; supported: default, lin"):
        RopeConfig.from_hf(config, 64, 2048)
