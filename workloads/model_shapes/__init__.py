"""Configurations of well-known models, to run their true shapes with dummy weights.

The figures are those of the models' published `config.json` files; `llama-3-8b` has Llama 3.1's
context length and Llama 3's plain rotary embedding, so that long prompts can be measured with it.
"""

from pathlib import Path

SHAPES = ("llama-3-8b", "llama-2-7b")

_SAME_SHAPE = {
    "llama-3-8b": ("meta-llama/meta-llama-3-8b", "meta-llama/llama-3.1-8b"),
    "llama-2-7b": ("meta-llama/llama-2-7b-hf", "meta-llama/llama-2-7b-chat-hf"),
}


def model_shape_folder(name: str) -> Path:
    """Return a folder that can be opened with `load_format="dummy"`.

    Raises:
        ValueError: There is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"model shape must be one of {SHAPES}, got {name!r}")
    return Path(__file__).parent / name


def find_shape(model: str) -> Path | None:
    """Return the folder of the shape that a name, or a hub id of that shape, stands for."""
    plain = model.lower().removesuffix("-instruct")
    for name, hub_ids in _SAME_SHAPE.items():
        if plain == name or plain in hub_ids:
            return model_shape_folder(name)
    return None
