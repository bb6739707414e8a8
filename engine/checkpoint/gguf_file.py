"""The GGUF container: metadata and a table of tensors in one file.

Only the container is read here; what the metadata mean is for the other gguf modules. The `gguf`
package has a reader too, but it makes several numpy arrays of every vocabulary entry (3.6 s for
SmolLM2's, 0.1 s here) and reports damage as whatever numpy trips over.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from engine.errors import CheckpointError

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
SCALAR_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING_TYPE, ARRAY_TYPE = 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """An entry of the tensor table.

    Attributes:
        shape: Outermost dimension first, as in torch (the file has it the other way round).
        quant_type: How the elements are stored.
        offset: First byte in the file.
        num_bytes: Size of the data.
    """

    shape: tuple[int, ...]
    quant_type: GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file, mapped into memory.

    Attributes:
        path: Where it is.
        metadata: All key-value pairs; arrays are lists.
        tensors: The tensor table, by GGUF name.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and read everything but the tensors' data.

        Raises:
            CheckpointError: The file is missing, truncated, damaged or of an unsupported version.
        """
        self.path = path
        try:
            with path.open("rb") as stream:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"cannot read the GGUF file {path}: {error}") from error
        try:
            self.metadata, self.tensors = _Parser(self._data).parse()
        except (struct.error, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is not a readable GGUF file: {error}; download or convert it again"
            ) from error

    def rows(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor as `[rows, bytes_per_row]` uint8, a read-only view.

        Quantisation blocks run along the innermost dimension, so rows can be reordered before
        they are dequantised.
        """
        tensor = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        return flat.reshape(math.prod(tensor.shape[:-1]), -1)


class _Parser:
    """A cursor over the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self._data[:4] != MAGIC:
            raise ValueError(f"it starts with {self._data[:4]!r} instead of {MAGIC!r}")
        self._position = 4
        version = self._scalar("I")
        if version not in SUPPORTED_VERSIONS:
            raise ValueError(
                f"version {version} is not one of {SUPPORTED_VERSIONS} (little-endian)"
            )
        num_tensors, num_pairs = self._scalar("Q"), self._scalar("Q")
        metadata = {}
        for _ in range(num_pairs):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        table = [self._entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        return metadata, {entry.name: self._place(start, entry) for entry in table}

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._position)
        self._position += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode()

    def _bytes(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise ValueError("it ends in the middle of its header")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def _value(self, type_id: int) -> Any:
        if type_id == STRING_TYPE:
            return self._string()
        if type_id != ARRAY_TYPE:
            return self._scalar(_scalar_format(type_id))
        item_type, count = self._scalar("I"), self._scalar("Q")
        if item_type == STRING_TYPE:
            return [self._string() for _ in range(count)]
        if item_type == ARRAY_TYPE:
            return [self._value(ARRAY_TYPE) for _ in range(count)]
        item = struct.Struct("<" + _scalar_format(item_type))
        return [value for (value,) in item.iter_unpack(self._bytes(count * item.size))]

    def _entry(self) -> "_Entry":
        name, num_dims = self._string(), self._scalar("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise ValueError(f"tensor {name} has {num_dims} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(num_dims)]))
        return _Entry(name, shape, self._scalar("I"), self._scalar("Q"))

    def _place(self, start: int, entry: "_Entry") -> GGUFTensor:
        quant_type = GGMLQuantizationType(entry.type_id)
        block_elements, block_bytes = GGML_QUANT_SIZES[quant_type]
        if entry.shape[-1] % block_elements:
            raise ValueError(
                f"rows of tensor {entry.name} are no multiple of {block_elements} elements"
            )
        num_bytes = math.prod(entry.shape) // block_elements * block_bytes
        end = start + entry.offset + num_bytes
        if num_bytes == 0 or end > len(self._data):
            raise ValueError(
                f"tensor {entry.name} ends at byte {end} of {len(self._data)}: it is truncated"
            )
        return GGUFTensor(
            shape=entry.shape,
            quant_type=quant_type,
            offset=start + entry.offset,
            num_bytes=num_bytes,
        )


class _Entry(NamedTuple):
    """An entry of the tensor table as it is written; `offset` counts from the first tensor."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def _scalar_format(type_id: int) -> str:
    if type_id not in SCALAR_FORMATS:
        raise ValueError(f"metadata type {type_id} is unknown")
    return SCALAR_FORMATS[type_id]
