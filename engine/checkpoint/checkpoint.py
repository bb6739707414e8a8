"""What every checkpoint format offers to the rest of the engine.

The lingua franca is Hugging Face: `config` is the dict of a config.json, tensors carry the names
of Hugging Face state dicts. Making a model of them is not done here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the server's HTTP process opens checkpoints before it needs either, if ever
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(ABC):
    """An opened model: its configuration, its tokenizer and its weights, read on demand.

    Attributes:
        name: What to call the model in messages and API answers.
        path: The folder or file it was opened from.
        config: The contents of config.json.
        generation_config: The contents of generation_config.json; empty if there is none.
    """

    name: str
    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @abstractmethod
    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer, with its chat template if the checkpoint has one.

        Raises:
            CheckpointError: There is no tokenizer, or it is broken or unsupported.
        """

    @abstractmethod
    def tensor_names(self) -> list[str]:
        """Return the Hugging Face names of all tensors, in the order they are stored."""

    @abstractmethod
    def read(self, name: str, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """Read one tensor.

        Args:
            name: Its Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
            device: Where to put it.

        Returns:
            The tensor in the shape of the state dict and the dtype that is stored; quantised
            types are dequantised to float32. It may share memory with the file: do not write to it.

        Raises:
            CheckpointError: There is no such tensor, or its data are broken.
        """

    def tensors(self, device: "torch.device | str" = "cpu") -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield every tensor with its name, one at a time, as `read` returns it.

        Raises:
            CheckpointError: A tensor's data are broken.
        """
        for name in self.tensor_names():
            yield name, self.read(name, device)
