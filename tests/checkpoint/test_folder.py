"""Model folders: sharded and single safetensors, tokenizer files, and every way to be broken."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.errors import CheckpointError

TinyModel = Callable[..., PreTrainedModel]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A complete model in one safetensors file, without a tokenizer."""
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded(tiny_model: TinyModel, tmp_path: Path) -> Path:
    tiny_model("qwen2").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def assert_same(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensor_names()) == set(expected)
    streamed = dict(checkpoint.tensors())
    assert list(streamed) == checkpoint.tensor_names()
    for name, tensor in expected.items():
        assert torch.equal(streamed[name], tensor)
        assert torch.equal(checkpoint.read(name), tensor)


def test_single_file(folder: Path, tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert_same(checkpoint, tiny_model("llama").state_dict())
    assert (checkpoint.name, checkpoint.path) == ("tiny", folder)
    assert checkpoint.config == json.loads((folder / "config.json").read_text())
    assert checkpoint.generation_config["eos_token_id"] == 2


def test_shards(sharded: Path, tiny_model: TinyModel) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert_same(
        open_checkpoint(sharded, load_format="safetensors"), tiny_model("qwen2").state_dict()
    )


def test_tied_embeddings_are_stored_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("qwen3", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    expected = dict(model.state_dict())
    del expected["lm_head.weight"]
    assert_same(checkpoint, expected)
    assert checkpoint.config["tie_word_embeddings"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_dtypes_are_kept(folder: Path, dtype: torch.dtype) -> None:
    values = torch.arange(12, dtype=dtype).view(3, 4)
    save_file({"a": values}, folder / "model.safetensors")
    read = open_checkpoint(folder).read("a")
    assert read.dtype == dtype
    assert torch.equal(read, values)


def test_files_without_an_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"b": torch.ones(2)}, folder / "part-2.safetensors")
    save_file({"a": torch.ones(1)}, folder / "part-1.safetensors")
    save_file({"other": torch.ones(1)}, folder / "consolidated.safetensors")
    save_file({"lora": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert open_checkpoint(folder).tensor_names() == ["a", "b"]


def test_no_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).generation_config == {}


def test_dummy_needs_config_only(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path, load_format="dummy")
    assert checkpoint.config == config
    assert (checkpoint.tensor_names(), list(checkpoint.tensors())) == ([], [])
    with pytest.raises(CheckpointError, match="opened without weights"):
        checkpoint.read("a")


def test_missing_tensor(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="tiny hold no tensor nonsense"):
        open_checkpoint(folder).read("nonsense")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no config\.json$"):
        open_checkpoint(folder)
    (folder / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json; give the path of the \.gguf file"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": ', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1, 2]", "should hold a JSON object, not a list"),
        (b"", "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_broken_json(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "holds no weights: expected model.safetensors or"),
        ("pytorch_model.bin", "but pytorch_model.bin: convert them to safetensors first"),
        ("consolidated.00.pth", "but consolidated.00.pth: convert them to safetensors first"),
        ("model.pt", "but model.pt: convert them to safetensors first"),
        ("model.gguf", "but model.gguf: give the path of the .gguf file"),
    ],
)
def test_no_weights(folder: Path, name: str | None, message: str) -> None:
    (folder / "model.safetensors").unlink()
    if name:
        (folder / name).touch()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_missing_shard(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    message = rf"names {shards[1].name}, which does not exist \(1 of {len(shards)} shards"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_shard_without_a_promised_tensor(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["promised"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks the tensor promised"):
        open_checkpoint(sharded)


def test_index_without_a_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(folder)


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
            open_checkpoint(folder)


def test_damaged_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (header_size,) = struct.unpack("<Q", whole[:8])
    path.write_bytes(whole[:8] + b"x" * header_size + whole[8 + header_size :])
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        open_checkpoint(folder)
    path.write_bytes(struct.pack("<Q", 2**62) + whole[8:])
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        open_checkpoint(folder)


def test_weights_vanish_after_opening(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        next(iter(checkpoint.tensors()))


def test_git_lfs_pointer(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
    (folder / "model.safetensors").write_bytes(pointer)
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [({"quant_method": "awq"}, "quantised weights \\(awq\\)"), (None, "unknown method")],
)
def test_quantised_weights(folder: Path, quantization: Any, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_no_tokenizer(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer: expected tokenizer\.json"):
        open_checkpoint(folder).load_tokenizer()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "1.0"}', b"\xff\xff"])
def test_broken_tokenizer(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer in ") as caught:
        open_checkpoint(folder).load_tokenizer()
    assert "\n" not in str(caught.value)


def test_tokenizer_of_vocabulary_files(folder: Path, default_checkpoint: Checkpoint) -> None:
    """Without tokenizer.json, transformers converts what is there."""
    model = json.loads((default_checkpoint.path / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = open_checkpoint(folder).load_tokenizer()
    expected = default_checkpoint.load_tokenizer()("Hello, world")["input_ids"]
    assert tokenizer("Hello, world")["input_ids"] == expected


def test_big_vocabularies_ask_no_network(
    folder: Path, default_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks the hub about vocabularies above 100,000 tokens unless told not to."""
    content = json.loads((default_checkpoint.path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab |= {f"filler{n}": n for n in range(len(vocab), 110_000)}
    (folder / "tokenizer.json").write_text(json.dumps(content))

    def connect(*_: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    tokenizer = open_checkpoint(folder).load_tokenizer()
    assert len(tokenizer) == 110_000
    assert tokenizer("Hello")["input_ids"] == [19556]


def test_tokenizer_json_is_taken_as_it_is(
    folder: Path, default_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """A class name in tokenizer_config.json must not change how text is cut."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((default_checkpoint.path / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "model_max_length": 8}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_checkpoint(folder).load_tokenizer()
    text = "  12345 tokens, it's 2024"
    expected = default_checkpoint.load_tokenizer()(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == expected
    assert len(expected) > 8
    assert caplog.text == ""  # whoever asks for long texts checks the length itself
