"""Result files: what was measured, where, with what and by which command."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.machine import find_machine


def write_result(folder: Path, name: str, results: Any, options: dict[str, Any]) -> Path:
    """Write one result file under the key `results`, whole or not at all.

    Args:
        folder: Created if needed.
        name: Of the file, without ending.
        results: JSON-able.
        options: What the measurement was asked to do.

    Returns:
        The file's path.
    """
    content = {"name": name, **circumstances(options), "results": results}
    return write_json(folder / f"{name}.json", content)


def circumstances(options: dict[str, Any], *, simulated: bool = False) -> dict[str, Any]:
    """Return what every result file says beside its figures."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "command": _command(),
        "options": options,
        "machine": asdict(find_machine()),
        "simulated": simulated,
    }


def write_json(path: Path, content: Any) -> Path:
    """Write a file, whole or not at all; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)
    return path


def _command() -> str:
    module = _module_name()
    start = "neo" if module in ("neo", "neo_cli.main") else f"python -m {module}"
    return " ".join([start, *sys.argv[1:]])


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name


def _commit() -> str:
    """Return the commit of the sources: `$NEO_COMMIT`, or what git says of this folder."""
    if named := os.environ.get("NEO_COMMIT"):
        return named
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
