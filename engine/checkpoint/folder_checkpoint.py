"""A Hugging Face model folder as a checkpoint: config.json, safetensors, tokenizer files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint.checkpoint import Checkpoint
from engine.checkpoint.folder_tokenizer import load_folder_tokenizer
from engine.checkpoint.json_file import read_json_object
from engine.checkpoint.safetensors_files import SafetensorsFiles, find_safetensors
from engine.errors import CheckpointError

if TYPE_CHECKING:  # see `engine.checkpoint.checkpoint`
    import torch
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderCheckpoint(Checkpoint):
    """A model in a folder.

    Attributes:
        weights: Where the tensors lie; None if the model is to get dummy weights.
    """

    weights: SafetensorsFiles | None

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer's files; see `Checkpoint.load_tokenizer`."""
        return load_folder_tokenizer(self.path)

    def tensor_names(self) -> list[str]:
        """Return the names of all tensors, file by file; none with dummy weights."""
        return list(self.weights.files) if self.weights else []

    def read(self, name: str, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """Read one tensor straight to the device; see `Checkpoint.read`."""
        if self.weights is None:
            raise CheckpointError(f"{self.path} was opened without weights; cannot read {name}")
        return self.weights.read(name, device)

    def tensors(self, device: "torch.device | str" = "cpu") -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield all tensors, opening each file once; see `Checkpoint.tensors`."""
        if self.weights is not None:
            yield from self.weights.tensors(device)


def open_folder(folder: Path, name: str, *, with_weights: bool) -> FolderCheckpoint:
    """Open a model folder.

    Args:
        folder: The folder.
        name: What to call the model.
        with_weights: False for dummy weights: config.json is enough then.

    Raises:
        CheckpointError: config.json or the weights are missing, broken or unsupported.
    """
    if not (folder / CONFIG_FILE).is_file():
        hint = "; give the path of the .gguf file itself" if any(folder.glob("*.gguf")) else ""
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG_FILE}{hint}")
    config = read_json_object(folder / CONFIG_FILE)
    if with_weights and "quantization_config" in config:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{folder} holds quantised weights ({method or 'unknown method'}), which is not "
            "supported in safetensors yet; use the original model or a GGUF file"
        )
    generation_config = folder / GENERATION_CONFIG_FILE
    return FolderCheckpoint(
        name=name,
        path=folder,
        config=config,
        generation_config=(
            read_json_object(generation_config) if generation_config.is_file() else {}
        ),
        weights=find_safetensors(folder) if with_weights else None,
    )
