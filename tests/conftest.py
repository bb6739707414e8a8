"""Fixtures that several test folders share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """The embedded model as a Hugging Face folder, converted at most once per machine."""
    from engine.checkpoint import open_checkpoint

    return open_checkpoint(None).path
