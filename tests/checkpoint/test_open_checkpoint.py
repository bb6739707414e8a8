"""What a model argument means: a path, a hub id, or neither."""

from collections.abc import Callable
from pathlib import Path

import httpx2
import huggingface_hub.errors
import pytest
from transformers import PreTrainedModel

from engine.checkpoint import hub, open_checkpoint
from engine.errors import CheckpointError, ConfigError

TinyModel = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(
    "model",
    ["./x", "../x", "/nowhere/x", "~/nowhere", "x.gguf", "a/b/c", "folder/", Path("org/name")],
)
def test_paths_that_do_not_exist(model: str | Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder: "):
        open_checkpoint(model)


@pytest.mark.parametrize("model", ["", "word", "org/na me", "a\0b", "x" * 5000, "org/"])
def test_neither_path_nor_hub_id(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a local folder|no such file or folder"):
        open_checkpoint(model)


def test_unknown_load_format() -> None:
    with pytest.raises(ConfigError, match="'pickle' is unknown; choose from auto, safetensors"):
        open_checkpoint(None, load_format="pickle")


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(
        CheckpointError, match=r"is no \.gguf file; for safetensors give the folder"
    ):
        open_checkpoint(path)


def test_load_format_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(CheckpointError, match="is a GGUF file, but load_format is safetensors"):
        open_checkpoint(path, load_format="safetensors")
    with pytest.raises(CheckpointError, match=r"is a folder; give the path of the \.gguf"):
        open_checkpoint(tmp_path, load_format="gguf")


def test_relative_folder(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").path == Path("org/name")
    monkeypatch.chdir(tmp_path / "org" / "name")
    assert open_checkpoint(".").name == "name"


def test_hub_model(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot_download(repo_id: str, **arguments: object) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(tmp_path)

    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("org/name", revision="v1")
    assert (checkpoint.name, checkpoint.path) == ("org/name", tmp_path)
    assert (asked["repo_id"], asked["revision"]) == ("org/name", "v1")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    open_checkpoint("org/name", load_format="dummy")
    assert "*.safetensors" not in asked["allow_patterns"]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise httpx2.ConnectError("Name or service not known")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(
        CheckpointError,
        match=r"'org/name' is not a local folder, and downloading .* failed \(Name or service not "
        r"known\): check name and network",
    ):
        open_checkpoint("org/name")


def test_hub_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'org/name' is not a local folder, and downloading"):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "'org/name' at revision 'v1' is neither a local folder nor"),
        ("RevisionNotFoundError", "'org/name' at revision 'v1' is neither a local folder nor"),
        ("GatedRepoError", "asks for permission: accept its terms .* HF_TOKEN"),
        ("HfHubHTTPError", "failed .*: check name and network"),
    ],
)
def test_hub_answers(monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    def answer(*_: object, **__: object) -> None:
        response = httpx2.Response(403, request=httpx2.Request("GET", "https://example.org"))
        raise getattr(huggingface_hub.errors, kind)("refused", response=response)

    monkeypatch.setattr(hub, "snapshot_download", answer)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("org/name", revision="v1")
