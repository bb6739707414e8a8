"""The options of `neo generate` that give the output a form."""

from pathlib import Path

from engine.errors import RequestError
from engine.structured_output import StructuredOutput


def read_structured_output(
    json_schema: str | None, regex: str | None, choice: list[str] | None, grammar: Path | None
) -> StructuredOutput | None:
    """Return what the options ask for; None if none is given.

    Args:
        json_schema: A JSON schema, or a file that holds one.
        regex: A regular expression.
        choice: Strings to choose from.
        grammar: A file with a grammar.

    Raises:
        RequestError: Several are given, a file cannot be read, or a schema is no JSON.
    """
    if json_schema is None and regex is None and not choice and grammar is None:
        return None
    return StructuredOutput(
        json_schema=None if json_schema is None else _schema_text(json_schema),
        regex=regex,
        choice=choice or None,
        grammar=None if grammar is None else _read(grammar),
    )


def _schema_text(value: str) -> str:
    return value if value.lstrip().startswith(("{", "true", "false")) else _read(Path(value))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error.reason}") from error
