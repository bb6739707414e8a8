"""Fixtures shared by the checkpoint tests: the default model, tiny models, GGUF files of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.gguf_file import GGUFFile
from engine.checkpoint.gguf_tokenizer import gguf_tokenizer

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}

TinyModel = Callable[..., PreTrainedModel]
WriteGguf = Callable[..., Path]


@pytest.fixture(scope="session")
def default_checkpoint() -> Checkpoint:
    """The default model out of the machine's own cache, so that it is converted once only."""
    return open_checkpoint(None)


@pytest.fixture
def tiny_model() -> TinyModel:
    """Make a random model of a family; every parameter differs from its neighbours."""

    def make(family: str, **changes: Any) -> PreTrainedModel:
        config_class, model_class = MODELS[family]
        torch.manual_seed(0)
        model = model_class(config_class(**(SHAPE | changes)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        return model

    return make


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """Write a model as llama.cpp's converter would, with its own names from the gguf package."""

    def write(
        model: PreTrainedModel | None,
        *,
        architecture: str = "llama",
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
        dtype: type[np.floating[Any]] = np.float32,
        name: str = "model.gguf",
    ) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        pairs = dict(model_metadata(model, architecture)) if model else {}
        for key, value in (pairs | dict(metadata or {})).items():
            add_metadata(writer, key, value)
        if model:
            for tensor_name, data in model_tensors(model, architecture).items():
                writer.add_tensor(tensor_name, data.astype(dtype) if data.ndim > 1 else data)
        for tensor_name, data in (tensors or {}).items():
            writer.add_tensor(tensor_name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


@pytest.fixture
def rebuild(write_gguf: WriteGguf) -> Callable[[dict[str, Any]], PreTrainedTokenizerBase]:
    """Write tokenizer metadata to a file and make a tokenizer of it."""
    embedding = np.zeros((2000, 1), np.float32)  # its rows are the size of the vocabulary

    def make(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
        tensors = {"token_embd.weight": embedding}
        return gguf_tokenizer(GGUFFile(write_gguf(None, metadata=metadata, tensors=tensors)))

    return make


def model_metadata(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    config = model.config
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if head_dim := getattr(config, "head_dim", None):
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    special = {f"tokenizer.ggml.{key}": value for key, value in SPECIAL_TOKENS.items()}
    return {f"{architecture}.{key}": value for key, value in keys.items()} | special


def model_tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if architecture == "llama" and "q_proj" in name:
            data = llama_cpp_permutation(data, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            data = llama_cpp_permutation(data, config.num_key_value_heads)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = data
    return tensors


def llama_cpp_permutation(data: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K: interleave the two halves of every head."""
    halves = data.reshape(num_heads, 2, data.shape[0] // num_heads // 2, *data.shape[1:])
    return halves.swapaxes(1, 2).reshape(data.shape)


def add_metadata(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
