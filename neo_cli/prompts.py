"""Where prompts come from: arguments, a file, or standard input."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import RequestError

ChatPrompt = list[dict[str, Any]]
InputPrompt = str | ChatPrompt


def read_prompts(arguments: Sequence[str], prompt_file: Path | None) -> list[InputPrompt]:
    """Return the prompts that were given; standard input only if there is no other source.

    Args:
        arguments: Prompts on the command line; a single `-` is standard input, as one prompt.
        prompt_file: `.jsonl`: one JSON string, `{"prompt": ...}` or `{"messages": [...]}` a line;
            anything else is text, one prompt a line.

    Raises:
        RequestError: There is no prompt, one is empty, or the file is unusable.
    """
    if arguments and prompt_file is not None:
        raise RequestError("give prompts as arguments or with --prompt-file, not both")
    prompts: list[InputPrompt]
    if prompt_file is not None:
        prompts = _read_file(prompt_file)
    elif arguments and list(arguments) != ["-"]:
        prompts = list(arguments)
    elif sys.stdin.isatty() and not arguments:
        raise RequestError("no prompt: give one as an argument, with --prompt-file or on stdin")
    else:
        prompts = [_read_stdin()]
    for number, prompt in enumerate(prompts, start=1):
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise RequestError(f"prompt {number} is empty; give at least one character")
    if not prompts:
        raise RequestError(f"{prompt_file} holds no prompts")
    return prompts


def _read_stdin() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error.reason}") from error


def _read_file(path: Path) -> list[InputPrompt]:
    try:
        # Not splitlines: JSON strings may hold line separators of other scripts as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error.reason}") from error
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    numbered = enumerate(lines, start=1)
    return [_parse_line(line, f"{path}:{number}") for number, line in numbered if line.strip()]


def _parse_line(line: str, where: str) -> InputPrompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where} is not JSON: {error.msg}") from error
    if isinstance(value, dict):
        value = value.get("prompt", value.get("messages"))
    if value in ("", []):
        raise RequestError(f"{where}: the prompt is empty; give at least one character")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(_is_message(message) for message in value):
        return value
    raise RequestError(
        f'{where} must be a string, {{"prompt": "..."}} or '
        '{"messages": [{"role": "user", "content": "..."}]}'
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and "role" in message and "content" in message
