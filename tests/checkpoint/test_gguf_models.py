"""GGUF files of every supported family against the Hugging Face models they were made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.gguf_file import GGUFFile
from engine.checkpoint.gguf_tensors import read_gguf_tensor
from engine.errors import CheckpointError

FAMILIES = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("llama", {"head_dim": 32}, id="llama-head_dim"),
    pytest.param("llama", {"num_key_value_heads": 4}, id="llama-mha"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param("qwen2", {"tie_word_embeddings": True}, id="qwen2-tied"),
    pytest.param("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, id="qwen3-tied"),
]
DEQUANTISABLE = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]

TinyModel = Callable[..., PreTrainedModel]
WriteGguf = Callable[..., Path]


def state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def transformers_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """A model that transformers makes of the derived config and the tensors that were read."""
    config = AutoConfig.for_model(**checkpoint.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dict(checkpoint.tensors()), strict=not config.tie_word_embeddings)
    return model


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_tensors_are_bit_identical(
    tiny_model: TinyModel, write_gguf: WriteGguf, family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(family, **changes)
    checkpoint = open_checkpoint(write_gguf(model, architecture=family))
    expected = state_dict(model)
    assert set(checkpoint.tensor_names()) == set(expected)
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor, expected[name]), name
        assert torch.equal(checkpoint.read(name), expected[name]), name


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_derived_config_gives_the_same_logits(
    tiny_model: TinyModel, write_gguf: WriteGguf, family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(family, **changes).eval()
    checkpoint = open_checkpoint(write_gguf(model, architecture=family))
    rebuilt = transformers_model(checkpoint).eval()
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(rebuilt(ids).logits, model(ids).logits)
    assert checkpoint.config["dtype"] == "float32"
    assert checkpoint.config["tie_word_embeddings"] == model.config.tie_word_embeddings


def test_float16_stays_float16(tiny_model: TinyModel, write_gguf: WriteGguf) -> None:
    model = tiny_model("llama")
    checkpoint = open_checkpoint(write_gguf(model, dtype=np.float16))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(checkpoint.read(name), model.state_dict()[name].half())
    assert checkpoint.read("model.norm.weight").dtype == torch.float32
    assert checkpoint.config["dtype"] == "float16"


def write_raw(path: Path, rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> GGUFFile:
    """A file with one tensor of that type, given as bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("raw", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    kind = gguf.GGMLQuantizationType.BF16
    file = write_raw(tmp_path / "raw.gguf", gguf.quantize(values.float().numpy(), kind), kind)
    read = read_gguf_tensor(file, "raw", None)
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, values)


@pytest.mark.parametrize("kind", DEQUANTISABLE, ids=lambda kind: kind.name)
def test_every_quantisation_type(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    elements, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Small bytes: as the upper half of a float16 scale they keep it finite.
    rows = np.random.default_rng(0).integers(0, 60, (8, 512 // elements * num_bytes), np.uint8)
    read = read_gguf_tensor(write_raw(tmp_path / "raw.gguf", rows, kind), "raw", None)
    assert read.shape == (8, 512)
    np.testing.assert_array_equal(read.float().numpy(), gguf.dequantize(rows, kind))


def test_quantised_rows_are_reordered_like_floats(
    tiny_model: TinyModel, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    checkpoint = open_checkpoint(write_gguf(model))
    name = "model.layers.0.self_attn.q_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    permuted = GGUFFile(checkpoint.path).rows("blk.0.attn_q.weight").view(np.float32)
    file = write_raw(tmp_path / "raw.gguf", gguf.quantize(permuted, kind), kind)
    plain = gguf.quantize(model.state_dict()[name].numpy(), kind)
    np.testing.assert_array_equal(
        read_gguf_tensor(file, "raw", 4).numpy(), gguf.dequantize(plain, kind)
    )


def test_undequantisable_type(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_K
    rows = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    file = write_raw(tmp_path / "raw.gguf", rows, kind)
    with pytest.raises(CheckpointError, match="tensor raw is stored as Q8_K"):
        read_gguf_tensor(file, "raw", None)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(
    tiny_model: TinyModel, write_gguf: WriteGguf, factor: float
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=dict(scaling),  # transformers adds to it
    )
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    table = (plain / frequencies).numpy()
    model = tiny_model("llama", hidden_size=512, rope_theta=500000.0)
    path = write_gguf(model, tensors={"rope_freqs.weight": table})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_scaling"] == scaling
    assert checkpoint.config["rope_theta"] == 500000.0
    assert not any("rope" in name for name in checkpoint.tensor_names())


def test_table_of_ones_is_no_scaling(tiny_model: TinyModel, write_gguf: WriteGguf) -> None:
    table = np.ones(8, np.float32)
    path = write_gguf(tiny_model("llama"), tensors={"rope_freqs.weight": table})
    assert open_checkpoint(path).config["rope_scaling"] is None


def test_unknown_table(tiny_model: TinyModel, write_gguf: WriteGguf) -> None:
    table = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tiny_model("llama"), tensors={"rope_freqs.weight": table})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not the one of Llama"):
        open_checkpoint(path)


def test_other_rope_scaling(tiny_model: TinyModel, write_gguf: WriteGguf) -> None:
    model = tiny_model("qwen2")

    def scaling(**keys: Any) -> Any:
        metadata = {f"qwen2.rope.scaling.{key}": value for key, value in keys.items()}
        path = write_gguf(model, architecture="qwen2", metadata=metadata)
        return open_checkpoint(path).config["rope_scaling"]

    assert scaling(type="none") is None
    assert scaling(type="linear", factor=4.0) == {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert scaling(type="yarn", factor=4.0, original_context_length=64) == yarn
    with_extras = scaling(
        type="yarn",
        factor=4.0,
        original_context_length=64,
        attn_factor=0.5,
        yarn_beta_fast=30.0,
        yarn_beta_slow=2.0,
    )
    assert with_extras["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * np.log(4)))
    assert (with_extras["beta_fast"], with_extras["beta_slow"]) == (30.0, 2.0)
    with pytest.raises(CheckpointError, match="'longrope' is not supported; supported: linear"):
        scaling(type="longrope")


def test_sliding_window_means_mistral(tiny_model: TinyModel, write_gguf: WriteGguf) -> None:
    path = write_gguf(tiny_model("llama"), metadata={"llama.attention.sliding_window": 4096})
    config = open_checkpoint(path).config
    assert config["architectures"] == ["MistralForCausalLM"]
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 4096)


def test_end_of_turn_is_an_end(tiny_model: TinyModel, write_gguf: WriteGguf) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.padding_token_id": 2**32 - 1}
    checkpoint = open_checkpoint(write_gguf(tiny_model("llama"), metadata=metadata))
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 5]}
    assert checkpoint.config["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"split.count": 3}, "one of 3 parts.*llama-gguf-split --merge"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count = 8 differs"),
        ({"llama.attention.value_length": 8}, "attention.value_length = 8 differs"),
        ({"llama.feed_forward_length": [96, 64]}, "feed_forward_length should be one integer"),
        ({"llama.rope.freq_base": "many"}, "freq_base should be one number"),
    ],
)
def test_unsupported_metadata(
    tiny_model: TinyModel, write_gguf: WriteGguf, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(tiny_model("llama"), metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_unsupported_architecture(write_gguf: WriteGguf) -> None:
    with pytest.raises(CheckpointError, match="'gemma' is not supported; supported: llama, qwen2"):
        open_checkpoint(write_gguf(None, architecture="gemma"))


def test_missing_metadata(write_gguf: WriteGguf) -> None:
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count is missing"):
        open_checkpoint(write_gguf(None))


def test_unknown_tensor(tiny_model: TinyModel, write_gguf: WriteGguf) -> None:
    extra = {"blk.0.attn_sub_norm.weight": np.ones(4, np.float32)}
    with pytest.raises(CheckpointError, match=r"attn_sub_norm\.weight belongs to no supported"):
        open_checkpoint(write_gguf(tiny_model("llama"), tensors=extra))


def test_missing_tensor(tiny_model: TinyModel, write_gguf: WriteGguf) -> None:
    checkpoint = open_checkpoint(write_gguf(tiny_model("llama")))
    with pytest.raises(CheckpointError, match=r"there is no tensor model\.layers\.9\.mlp"):
        checkpoint.read("model.layers.9.mlp.up_proj.weight")


def test_heads_that_do_not_fit(tiny_model: TinyModel, write_gguf: WriteGguf) -> None:
    metadata = {"llama.attention.head_count": 5, "llama.attention.key_length": 16}
    checkpoint = open_checkpoint(write_gguf(tiny_model("llama"), metadata=metadata))
    with pytest.raises(CheckpointError, match=r"64 rows of tensor blk\.0\.attn_q.* into 5 heads"):
        checkpoint.read("model.layers.0.self_attn.q_proj.weight")
