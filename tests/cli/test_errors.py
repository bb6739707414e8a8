"""Whatever is wrong: one line on standard error, no traceback, the right exit code."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Neo

pytestmark = pytest.mark.ispc
USAGE = "(see `neo generate --help`)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus", "x"], "No such option: --bogus"),
        (["--temperature", "hot", "x"], "Invalid value for '--temperature'"),
        (["--temperature", "-1", "x"], "temperature must be a finite number of at least 0"),
        (["--temperature", "nan", "x"], "temperature must be a finite number"),
        (["--top-p", "0", "x"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--top-k", "-2", "x"], "top_k must be 0 or -1 (off) or a positive count, got -2"),
        (["--min-p", "2", "x"], "min_p must be between 0.0 and 1.0, got 2.0"),
        (["--repetition-penalty", "0", "x"], "repetition_penalty must be a finite number above"),
        (["--max-tokens", "0", "x"], "max_tokens must be at least 1, got 0"),
        (["--min-tokens", "999", "x"], "min_tokens must be between 0 and max_tokens (256)"),
        (["--logprobs", "5", "x"], "logprobs are printed with --json only"),
        (["--json", "--logprobs", "21", "x"], "logprobs must be between 0 and 20, got 21"),
        (["--logit-bias", "5", "x"], "logit_bias must be TOKEN_ID=BIAS, got '5'"),
        (["--logit-bias", "5=x", "x"], "logit_bias must be TOKEN_ID=BIAS, got '5=x'"),
        (["--logit-bias", "5=999", "x"], "logit_bias must be between -100.0 and 100.0, got 999"),
        (["--stop", "", "x"], "stop must be strings that are not empty"),
        (["--dtype", "int4", "x"], "dtype must be one of auto, bfloat16, float16, float32"),
        (["--load-format", "pt", "x"], "load_format must be one of auto, safetensors, gguf, dummy"),
        (["--device", "tpu", "x"], "device must be auto, cpu, cuda or cuda:N, got tpu"),
        (["--block-size", "17", "x"], "block_size must be one of (16, 32, 64), got 17"),
        (["--max-model-len", "0", "x"], "max_model_len must be at least 1, got 0"),
        (["--host-kv-gb", "0", "x"], "host_kv_gb must be above 0, got 0.0"),
        (["--threads", "0", "x"], "threads must be at least 1, got 0"),
        (["--gpu-memory-utilization", "1.5", "x"], "gpu_memory_utilization must be above 0"),
        (["--max-num-batched-tokens", "5", "x"], "max_num_batched_tokens must be at least"),
        ([""], "prompt 1 is empty; give at least one character"),
        (["fine", " \n"], "prompt 2 is empty"),
        (["x", "--prompt-file", "y"], "give prompts as arguments or with --prompt-file, not both"),
        (["--prompt-file", "/nonexistent"], "cannot read /nonexistent: No such file"),
        (["--prompt-file", "/"], "cannot read /: Is a directory"),
    ],
)
def test_wrong_usage(neo: Neo, arguments: list[str], message: str) -> None:
    result = neo("generate", *arguments)
    assert message in result.error_line
    assert result.error_line.startswith("neo: error: ")
    assert result.error_line.endswith(USAGE)
    assert result.code == 2


def test_no_command_and_unknown_command(neo: Neo) -> None:
    assert "No such command 'serv'" in neo("serv").error_line
    nothing = neo()
    assert nothing.code == 2
    assert "generate" in nothing.out + nothing.err


def test_no_prompt(neo: Neo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "prompt 1 is empty" in neo("generate").error_line
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    result = neo("generate")
    assert "no prompt: give one as an argument, with --prompt-file or on stdin" in result.error_line
    assert result.code == 2


def test_input_that_is_no_text(neo: Neo, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert "standard input is not UTF-8 text" in neo("generate").error_line
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff")
    assert f"{file} is not UTF-8 text" in neo("generate", "-f", file).error_line
    file.write_text("\n \n")
    assert f"{file} holds no prompts" in neo("generate", "-f", file).error_line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":3 is not JSON: "),
        ("5", ":3 must be a string"),
        ('{"text": "x"}', ":3 must be a string"),
        ('{"messages": ["x"]}', ":3 must be a string"),
        ('{"prompt": ""}', ":3: the prompt is empty"),
        ('{"messages": []}', ":3: the prompt is empty"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(neo: Neo, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n\n{line}\n')
    result = neo("generate", "-f", file)
    assert f"{file}{message}" in result.error_line
    assert result.code == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nonexistent/model", "no such file or folder: /nonexistent/model"),
        ("./model.gguf", "no such file or folder: ./model.gguf"),
        ("", "is neither a local folder"),
        ("what is this", "is neither a local folder"),
    ],
)
def test_bad_model_path(neo: Neo, model: str, message: str) -> None:
    result = neo("generate", "--model", model, "x")
    assert message in result.error_line
    assert result.code == 1


def test_folder_without_a_model(neo: Neo, tmp_path: Path) -> None:
    assert "config.json" in neo("generate", "--model", tmp_path, "x").error_line
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in neo("generate", "--model", tmp_path, "x").error_line
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    result = neo("generate", "--load-format", "dummy", "--model", tmp_path, "x")
    assert "architecture BertModel is not supported; supported: Llama" in result.error_line


def test_broken_safetensors(neo: Neo, tiny_chat: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_chat, tmp_path, dirs_exist_ok=True)
    for content in (b"", b"not safetensors", (2**60).to_bytes(8, "little") + b"{}"):
        (tmp_path / "model.safetensors").write_bytes(content)
        result = neo("generate", "--model", tmp_path, "x")
        assert "model.safetensors" in result.error_line
        assert result.code == 1


def test_what_the_model_does_not_allow(neo: Neo, tiny_options) -> None:
    def error(*arguments: object) -> str:
        result = neo("generate", *tiny_options, *arguments)
        assert result.code == 1
        return result.error_line

    assert "with a context of 64 tokens it may have 63" in error(
        "--max-model-len", 64, "--raw", "word " * 80
    )
    assert "max_model_len must be at most 20000" in error("--max-model-len", 20_001, "x")
    assert "--device-kv-blocks" in error("--device-kv-blocks", 2, "--max-model-len", 100, "x")
    no_blocks = ["--model", tiny_options[1], "--load-format", "dummy", "--host-kv-gb", "0.000001"]
    assert "less than one KV block" in neo("generate", *no_blocks, "x").error_line
    assert "logit_bias token ids must be from 0 to 49151" in error("--logit-bias", "60000=1", "x")
    assert "prompt 2: the prompt is not valid text" in error("x", "\udcff")
    assert "--system needs a chat template" in error("--raw", "--system", "s", "x")
    if not torch.cuda.is_available():
        assert "use --device cpu" in error("--device", "cuda", "x")


def test_messages_need_the_template(neo: Neo, tiny_options, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    result = neo("generate", *tiny_options, "--raw", "-f", file)
    assert "prompt 1: messages need the chat template; leave out --raw" in result.error_line


def test_no_chat_template(neo: Neo, tiny_options, tiny_chat: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_chat, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    options = [*tiny_options, "--model", tmp_path]
    assert "the model has no chat template" in neo("generate", *options, "--chat", "x").error_line
    assert neo("generate", *options, "x").code == 0


@pytest.mark.parametrize("parent", ["a file", "/proc/nope"])
def test_unwritable_cache(neo: Neo, monkeypatch, tmp_path: Path, parent: str) -> None:
    if parent == "a file":
        parent = str(tmp_path / "file")
        Path(parent).write_text("")
    monkeypatch.setenv("NEO_CACHE_DIR", f"{parent}/cache")
    for command in (["generate", "x"], ["build-kernels"]):
        result = neo(*command)
        assert f"cannot write to the cache folder {parent}/cache" in result.error_line
        assert "set NEO_CACHE_DIR" in result.error_line
        assert result.code == 1


def test_missing_kernels(neo: Neo, monkeypatch, tmp_path: Path, tiny_options) -> None:
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path))
    result = neo("generate", *tiny_options, "--device", "cpu", "x")
    assert "CPU kernels are not built: run `neo build-kernels`" in result.error_line
    assert result.code == 1
    info = neo("info")
    assert info.code == 0
    assert "not built: run neo build-kernels" in info.out


def test_a_bug_keeps_its_traceback(neo: Neo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.machine.find_machine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        neo("info")
