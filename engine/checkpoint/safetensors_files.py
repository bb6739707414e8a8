"""The safetensors files of a model folder: one file, or shards named by an index."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from engine.checkpoint.json_file import read_json_object
from engine.errors import CheckpointError

if TYPE_CHECKING:  # see `engine.checkpoint.checkpoint`
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The same weights in another layout, and weights that are no model by themselves.
OTHER_WEIGHTS = ("consolidated", "adapter_model")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class SafetensorsFiles:
    """Where each tensor of a model lies.

    Attributes:
        files: The file of each tensor, in the order of the files.
    """

    files: dict[str, Path]

    def read(self, name: str, device: "torch.device | str") -> "torch.Tensor":
        """Read one tensor straight to the device.

        Raises:
            CheckpointError: There is no such tensor, or its file is broken.
        """
        if name not in self.files:
            folder = next(iter(self.files.values())).parent if self.files else "the folder"
            raise CheckpointError(f"the safetensors files in {folder} hold no tensor {name}")
        return next(_read(self.files[name], [name], device))[1]

    def tensors(self, device: "torch.device | str") -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield all tensors, file by file.

        Raises:
            CheckpointError: A file is broken.
        """
        by_file: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            yield from _read(path, names, device)


def find_safetensors(folder: Path) -> SafetensorsFiles:
    """Find a folder's weights and check that every file is whole.

    Raises:
        CheckpointError: There are none, a shard is missing, or a file is damaged.
    """
    if (folder / INDEX_FILE).exists():
        return _indexed(folder)
    single = folder / SINGLE_FILE
    paths = [single] if single.exists() else _loose_files(folder)
    return SafetensorsFiles({name: path for path in paths for name in _names(path)})


def _loose_files(folder: Path) -> list[Path]:
    found = sorted(
        path for path in folder.glob("*.safetensors") if not path.name.startswith(OTHER_WEIGHTS)
    )
    if found:
        return found
    for pattern, advice in (
        ("*.gguf", "give the path of the .gguf file itself"),
        ("*.bin", "convert them to safetensors first; pickled weights are not supported"),
        ("*.pt*", "convert them to safetensors first; pickled weights are not supported"),
    ):
        if other := sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} holds no .safetensors files, but {other[0].name}: {advice}"
            )
    raise CheckpointError(
        f"{folder} holds no weights: expected {SINGLE_FILE} or {INDEX_FILE} with its shards"
    )


def _indexed(folder: Path) -> SafetensorsFiles:
    index = folder / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {missing[0]}, which does not exist ({len(missing)} of {len(shards)} "
            "shards are missing): download the model again"
        )
    stored = {shard: _names(folder / shard) for shard in shards}
    files: dict[str, Path] = {}
    for shard, names in stored.items():
        wanted = [name for name in weight_map if weight_map[name] == shard]
        if absent := set(wanted) - set(names):
            raise CheckpointError(
                f"{folder / shard} lacks the tensor {min(absent)}, which {INDEX_FILE} promises"
            )
        files |= dict.fromkeys(wanted, folder / shard)
    return SafetensorsFiles(files)


def _names(path: Path) -> list[str]:
    """Read a file's header; safetensors compares it with the file's size as well."""
    try:
        with safe_open(path, framework="numpy") as file:  # "pt" would import torch
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from error


def _read(
    path: Path, names: list[str], device: "torch.device | str"
) -> Iterator[tuple[str, "torch.Tensor"]]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> CheckpointError:
    try:
        with path.open("rb") as stream:
            is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        is_pointer = False
    if is_pointer:
        return CheckpointError(
            f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
        )
    return CheckpointError(f"{path} is not a readable safetensors file: {error}; download it again")
