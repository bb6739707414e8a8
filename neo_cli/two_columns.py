"""Names and values in two columns, a line each, however wide the terminal or pipe is."""

import sys
from collections.abc import Sequence
from typing import TextIO


def print_two_columns(rows: Sequence[tuple[str, str]], file: TextIO | None = None) -> None:
    """Print rows with their values aligned; on standard output if no file is given."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", file=file or sys.stdout)
