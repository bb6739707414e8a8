"""What every data set yields: lengths, and the text where there is one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class Sample:
    """One request of a data set; a length is None where it has to be counted in a text."""

    num_prompt_tokens: int | None
    num_output_tokens: int | None
    prompt_text: str | None = None
    output_text: str | None = None
    arrival_s: float | None = None


def broken(path: Path, what: str) -> RequestError:
    """Return the error for a data set file that cannot be used."""
    return RequestError(f"data set file {path}: {what}")


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        RequestError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise broken(path, f"cannot be read: {reason}") from error


def read_json(path: Path) -> Any:
    """Return a JSON file's content.

    Raises:
        RequestError: It cannot be read or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise broken(path, f"is not JSON (line {error.lineno}: {error.msg})") from error


def positive_int(value: Any, path: Path, where: str) -> int:
    """Return a token count.

    Raises:
        RequestError: It is none.
    """
    is_text = isinstance(value, str) and value.strip().isdigit()
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not (is_text or is_count) or int(value) < 1:
        raise broken(path, f"{where}: expected a number of tokens of at least 1, got {value!r}")
    return int(value)
