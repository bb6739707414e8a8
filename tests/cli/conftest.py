import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from neo_cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The one line on standard error."""
        assert self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.out == ""
        return self.err.rstrip("\n")


Neo = Callable[..., Result]


@pytest.fixture
def neo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Neo:
    """Run the command in this process: as the real one, but without the seconds of imports."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["neo", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        return Result(exit_info.value.code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_chat(default_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model without weights, with a real tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("tiny-chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_model_folder / name, folder)
    config = json.loads((default_model_folder / "config.json").read_text())
    changes = {"num_hidden_layers": 1, "max_position_embeddings": 20_000}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture
def tiny_options(tiny_chat: Path) -> list[object]:
    """Options of `neo generate` for a quick run of the tiny model."""
    small = ["--device-kv-blocks", 64, "--threads", 1, "--max-tokens", 8, "--temperature", 0]
    return ["--model", tiny_chat, "--load-format", "dummy", "--ignore-eos", *small]
