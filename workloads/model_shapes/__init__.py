"""Configurations of well-known models, to run their true shapes with dummy weights.

The figures are those of the models' published `config.json` files; `llama-3-8b` has Llama 3.1's
context length and Llama 3's plain rotary embedding, so that long prompts can be measured with it.
"""

from pathlib import Path

SHAPES = ("llama-3-8b", "llama-2-7b")


def model_shape_folder(name: str) -> Path:
    """Return a folder that can be opened with `load_format="dummy"`.

    Raises:
        ValueError: There is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"model shape must be one of {SHAPES}, got {name!r}")
    return Path(__file__).parent / name
