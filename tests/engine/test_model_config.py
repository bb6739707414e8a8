"""Reading config.json: what each family means by it, and what is refused."""

from typing import Any

import pytest

from engine.errors import CheckpointError, ConfigError
from engine.model_config import ModelConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def read(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**LLAMA, **changes}, generation)


def test_plain_llama() -> None:
    config = read()
    assert (config.head_dim, config.group_size, config.num_layers) == (64, 2, 2)
    assert config.kv_elements_per_token == 2 * 2 * 2 * 64
    assert config.dtype == "float32"


@pytest.mark.parametrize("architectures", [["BertModel"], [], None])
def test_an_unsupported_architecture_lists_the_supported_ones(architectures) -> None:
    supported = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    with pytest.raises(CheckpointError, match=f"is not supported; supported: {supported}"):
        read(architectures=architectures)


@pytest.mark.parametrize("key", sorted(set(LLAMA) - {"architectures", "num_key_value_heads"}))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json lacks the key '{key}'"):
        ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k != key})


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"vocab_size": None}, {"num_attention_heads": 0}],
    ids=str,
)
def test_unusable_values(changes) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json has an unusable value"):
        read(**changes)


def test_head_dim_without_a_kernel() -> None:
    with pytest.raises(ConfigError, match=r"head_dim must be one of .*, the model has 48"):
        read(head_dim=48)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(4, 3), (34, 2)])
def test_group_sizes_without_a_kernel(num_q_heads: int, num_kv_heads: int) -> None:
    with pytest.raises(ConfigError, match="num_q_heads must be 1 to 16 times num_kv_heads"):
        read(num_attention_heads=num_q_heads, num_key_value_heads=num_kv_heads, head_dim=64)


def test_every_head_has_its_own_kv_by_default() -> None:
    assert read(num_key_value_heads=None).num_kv_heads == 4


@pytest.mark.parametrize(
    ("architecture", "changes", "flags"),
    [
        ("LlamaForCausalLM", {}, ""),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, "qom"),
        ("MistralForCausalLM", {"attention_bias": True}, ""),
        ("Qwen2ForCausalLM", {}, "q"),
        ("Qwen3ForCausalLM", {}, "n"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "qon"),
    ],
)
def test_biases_and_norms_of_the_families(architecture, changes, flags: str) -> None:
    config = read(architectures=[architecture], **changes)
    found = (config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm)
    assert found == tuple(letter in flags for letter in "qomn")


def test_another_activation_is_refused() -> None:
    read(hidden_act="silu")
    with pytest.raises(CheckpointError, match="activation gelu is not supported; supported: silu"):
        read(hidden_act="gelu")


def test_quantized_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the checkpoint is quantized"):
        read(quantization_config={"quant_method": "gptq"})


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, 32),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, None),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}, None),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
            },
            32,
        ),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "sliding_window": 32,
                "layer_types": ["full_attention", "full_attention"],
            },
            None,
        ),
    ],
)
def test_sliding_window(changes, window: int | None) -> None:
    config = read(**changes)
    assert config.sliding_window == window
    config.check_max_model_len(32)
    if window is None:
        config.check_max_model_len(64)
    else:
        with pytest.raises(ConfigError, match=r"window of 32 tokens.*--max-model-len 32 or less"):
            config.check_max_model_len(33)


def test_a_context_longer_than_the_model_s_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len must be at most 64.*got 65"):
        read().check_max_model_len(65)


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (None, None, set()),
        (2, None, {2}),
        (2, {"eos_token_id": [3, 4]}, {2, 3, 4}),
        ([5, 6], {}, {5, 6}),
    ],
)
def test_end_tokens(own, generation, expected: set[int]) -> None:
    assert read(generation, eos_token_id=own).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "torch.float16"}, "float16")],
)
def test_dtype(changes, dtype: str) -> None:
    assert read(**changes).dtype == dtype
