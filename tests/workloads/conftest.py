import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(default_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a model of one layer."""
    folder = tmp_path_factory.mktemp("tiny")
    config = json.loads((default_model_folder / "config.json").read_text())
    changes = {"num_hidden_layers": 1, "vocab_size": 512, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps({**config, **changes, "eos_token_id": 2}))
    return folder
