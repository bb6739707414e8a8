"""Deciding what a model argument means, and opening it."""

import os
import re
from pathlib import Path

from engine.checkpoint.checkpoint import Checkpoint
from engine.checkpoint.default_model import (
    DEFAULT_MODEL_NAME,
    Progress,
    default_model_folder,
    default_model_gguf,
)
from engine.checkpoint.folder_checkpoint import open_folder
from engine.checkpoint.gguf_checkpoint import open_gguf
from engine.checkpoint.hub import download_model
from engine.errors import CheckpointError, ConfigError

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_checkpoint(
    model: str | Path | None,
    *,
    load_format: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a model.

    Args:
        model: A folder with config.json, a .gguf file, or the id of a model on the Hugging Face
            hub; None for the embedded default model.
        load_format: `auto` goes by what is found; `safetensors` and `gguf` insist on one;
            `dummy` needs no weights, the model makes its own.
        revision: Branch, tag or commit of a hub model.
        progress: Called with (done, all) tensors while the default model is converted.

    Raises:
        CheckpointError: The model does not exist, is broken or unsupported.
        ConfigError: `load_format` is unknown, or the cache folder cannot be written.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"load_format {load_format!r} is unknown; choose from {', '.join(LOAD_FORMATS)}"
        )
    if model is None:
        return _open_default(load_format, progress)
    with_weights = load_format != "dummy"
    path = Path(model).expanduser()
    if os.path.isfile(path):  # unlike Path.is_file, False for any text that cannot be a path
        return _open_file(path, load_format)
    if str(model) and os.path.isdir(path):
        if load_format == "gguf":
            raise CheckpointError(f"{path} is a folder; give the path of the .gguf file itself")
        return open_folder(path, path.resolve().name, with_weights=with_weights)
    if _looks_like_a_path(model):
        raise CheckpointError(f"no such file or folder: {model}")
    if not HUB_ID.fullmatch(str(model)):
        raise CheckpointError(
            f"{str(model)!r} is neither a local folder or .gguf file nor a hub id (organisation/"
            "name); leave the model out for the embedded default"
        )
    folder = download_model(str(model), revision, with_weights=with_weights)
    return open_folder(folder, str(model), with_weights=with_weights)


def _open_default(load_format: str, progress: Progress | None) -> Checkpoint:
    if load_format == "gguf":
        return open_gguf(default_model_gguf())
    folder = default_model_folder(progress)
    return open_folder(folder, DEFAULT_MODEL_NAME, with_weights=load_format != "dummy")


def _open_file(path: Path, load_format: str) -> Checkpoint:
    if path.suffix != ".gguf":
        raise CheckpointError(
            f"{path} is no .gguf file; for safetensors give the folder that holds config.json"
        )
    if load_format == "safetensors":
        raise CheckpointError(f"{path} is a GGUF file, but load_format is safetensors")
    return open_gguf(path)


def _looks_like_a_path(model: str | Path) -> bool:
    text = str(model)
    starts = (os.sep, f".{os.sep}", f"..{os.sep}", "~")
    return (
        isinstance(model, Path)
        or text in (".", "..")
        or text.startswith(starts)
        or text.endswith((".gguf", os.sep))
        or text.count(os.sep) > 1
    )
