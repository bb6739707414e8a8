"""The GGUF container: the same as the gguf package reads, and one clear error for all damage."""

import contextlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.checkpoint import open_checkpoint
from engine.checkpoint.gguf_file import GGUFFile
from engine.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small file with every kind of metadata and two tensors."""
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_uint8("a.uint8", 200)
    writer.add_int8("a.int8", -100)
    writer.add_uint16("a.uint16", 60000)
    writer.add_int16("a.int16", -30000)
    writer.add_uint32("a.uint32", 2**32 - 1)
    writer.add_int32("a.int32", -(2**31))
    writer.add_uint64("a.uint64", 2**63)
    writer.add_int64("a.int64", -(2**63))
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße 👋")
    writer.add_array("a.strings", ["", "one", "zwei ✓"])
    writer.add_array("a.ints", [3, -4, 5])
    writer.add_array("a.floats", [0.5, -0.25])
    writer.add_array("a.bools", [True, False])
    writer.add_custom_alignment(64)
    values = np.arange(24, dtype=np.float32)
    writer.add_tensor("first", values.reshape(2, 3, 4))
    writer.add_tensor("second", values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "small.gguf"


def test_agrees_with_the_gguf_package(path: Path) -> None:
    file, reference = GGUFFile(path), gguf.GGUFReader(path)
    expected: dict[str, Any] = {
        name: field.contents()
        for name, field in reference.fields.items()
        if not name.startswith("GGUF.")
    }
    assert file.metadata == expected
    assert len(file.metadata) == 18
    for tensor in reference.tensors:
        mine = file.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.quant_type, mine.num_bytes) == (tensor.tensor_type, tensor.n_bytes)
        assert mine.offset == tensor.data_offset
        assert file.rows(tensor.name).tobytes() == tensor.data.tobytes()
    assert file.rows("first").shape == (6, 16)


def test_every_truncation_is_noticed(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    end = max(tensor.offset + tensor.num_bytes for tensor in GGUFFile(path).tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in range(end):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GGUFFile(cut)


def test_damage_never_surfaces_as_another_error(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    for _ in range(500):
        content = bytearray(whole)
        for position in random.integers(0, len(whole), 3):
            content[position] = random.integers(0, 256)
        damaged.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            GGUFFile(damaged)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read the GGUF file"),
        (b"GG", "it starts with b'GG' instead of b'GGUF'"),
        (b"not a gguf file at all", "it starts with b'not '"),
        (b"GGUF\x01\x00\x00\x00" + bytes(32), "version 1 is not one of"),
        (b"GGUF\x00\x00\x00\x03" + bytes(32), "not one of .*little-endian"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it starts with b'vers'"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
