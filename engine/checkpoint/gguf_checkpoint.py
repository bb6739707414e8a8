"""A GGUF file as a checkpoint: configuration, tokenizer and weights from one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint.checkpoint import Checkpoint
from engine.checkpoint.gguf_config import gguf_architecture, gguf_config, gguf_generation_config
from engine.checkpoint.gguf_file import GGUFFile
from engine.checkpoint.gguf_tensors import hugging_face_names, read_gguf_tensor
from engine.checkpoint.gguf_tokenizer import gguf_tokenizer
from engine.errors import CheckpointError

if TYPE_CHECKING:  # see `engine.checkpoint.checkpoint`
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFCheckpoint(Checkpoint):
    """A model in one GGUF file; tensors are dequantised one by one as they are read.

    Attributes:
        file: The open file.
        names: The GGUF name of each tensor by its Hugging Face name.
    """

    file: GGUFFile
    names: dict[str, str]

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Build the tokenizer from the file's metadata; see `Checkpoint.load_tokenizer`."""
        return gguf_tokenizer(self.file)

    def tensor_names(self) -> list[str]:
        """Return the Hugging Face names of all tensors, in the order they are stored."""
        return list(self.names)

    def read(self, name: str, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """Dequantise one tensor on the CPU and move it; see `Checkpoint.read`."""
        if name not in self.names:
            raise CheckpointError(f"{self.path}: there is no tensor {name}")
        return read_gguf_tensor(self.file, self.names[name], self._permuted_heads(name)).to(device)

    def _permuted_heads(self, name: str) -> int | None:
        if gguf_architecture(self.file) != "llama":
            return None
        if ".q_proj." in name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if ".k_proj." in name else None


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Open a GGUF file.

    Raises:
        CheckpointError: It is unreadable, or holds an unsupported model.
    """
    file = GGUFFile(path)
    return GGUFCheckpoint(
        name=path.stem,
        path=path,
        config=gguf_config(file),
        generation_config=gguf_generation_config(file),
        file=file,
        names=hugging_face_names(file),
    )
