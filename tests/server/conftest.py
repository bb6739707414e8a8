import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.engine.chat_templates import HERMES
from tests.engine.tiny_models import make_tiny_model
from tests.server.running_server import RunningServer

Serve = Callable[..., RunningServer]

PROMPT = "The three largest cities of France are"
QUESTION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="session")
def smollm2_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The default model, as anyone would start it."""
    log = tmp_path_factory.mktemp("smollm2") / "log"
    options = ["--port", 0, "--max-model-len", 1024, "--dtype", "float32", "--device", "cpu"]
    with RunningServer(log, *options) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_chat_folder(default_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model without weights, with a real tokenizer and a template that knows tools."""
    folder = tmp_path_factory.mktemp("tiny-chat")
    shutil.copy(default_model_folder / "tokenizer.json", folder)
    tokenizer = json.loads((default_model_folder / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = HERMES
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = json.loads((default_model_folder / "config.json").read_text())
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    sizes = {"num_hidden_layers": 1, "hidden_size": 192, "intermediate_size": 256}
    changes = {**heads, **sizes, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model("llama3.1", folder)
    return folder


@pytest.fixture
def serve(tiny_chat_folder: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start servers of the tiny chat model; they end with the test."""
    servers: list[RunningServer] = []

    def start(*arguments: object, **options) -> RunningServer:
        log = tmp_path / f"server-{len(servers)}.log"
        servers.append(RunningServer(log, *tiny_options(tiny_chat_folder), *arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture(scope="session")
def tiny_server(
    tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """The tiny chat model, for tests that leave the server as it was."""
    log = tmp_path_factory.mktemp("tiny-server") / "log"
    with RunningServer(log, *tiny_options(tiny_chat_folder), "--max-model-len", 256) as server:
        yield server


def tiny_options(folder: Path) -> list[object]:
    """Return the options by which the tiny chat model starts fast."""
    model = ["--model", folder, "--load-format", "dummy", "--dtype", "float32"]
    return [*model, "--device", "cpu", "--device-kv-blocks", 4096, "--threads", 1, "--port", 0]


@pytest.fixture(scope="session")
def client(smollm2_server: RunningServer):
    with openai.OpenAI(
        base_url=f"{smollm2_server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


@pytest.fixture(scope="session")
def model(client: openai.OpenAI) -> str:
    [model] = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert model.owned_by == "neo"
    return model.id
