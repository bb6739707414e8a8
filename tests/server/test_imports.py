"""What the HTTP process loads: torch, the largest part of a start, is for the engine's alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.running_server import RunningServer

HTTP_SIDE = """
import sys
import neo_cli.serve, engine.server.run
assert "transformers" not in sys.modules, "it delays the start of the engine process"
from engine.checkpoint import open_checkpoint
from engine.prompt_encoder import load_prompt_encoder
encoder = load_prompt_encoder(open_checkpoint(None, load_format=sys.argv[1]), sys.argv[1])
assert encoder.chat_prompt([{"role": "user", "content": "Hello"}])
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("load_format", ["auto", "gguf"])
def test_opening_a_model_without_reading_its_weights_takes_no_torch(
    load_format: str, default_model_folder: Path
) -> None:
    command = [sys.executable, "-c", HTTP_SIDE, load_format]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.ispc
def test_a_server_has_torch_in_its_engine_process_only(smollm2_server: RunningServer) -> None:
    ask = {"prompt": "a", "max_tokens": 1, "logprobs": 1, "guided_choice": ["b"], "stop": "c"}
    status, _ = smollm2_server.post("/v1/completions", ask)
    assert status == 200
    assert "libtorch" in _mapped(smollm2_server.engine_pid)
    assert "libtorch" not in _mapped(smollm2_server.process.pid)


def _mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()
