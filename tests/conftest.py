"""Fixtures that several test folders share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where cores are shared, threads that spin while they wait for each other hardly get on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """The embedded model as a Hugging Face folder, converted at most once per machine."""
    from engine.checkpoint import open_checkpoint

    return open_checkpoint(None).path
