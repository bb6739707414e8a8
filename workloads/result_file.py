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
    """Write one result file, whole or not at all.

    Args:
        folder: Created if needed.
        name: Of the file, without ending.
        results: JSON-able.
        options: What the measurement was asked to do.

    Returns:
        The file's path.
    """
    content = {
        "name": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
        "options": options,
        "machine": asdict(find_machine()),
        "simulated": False,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)
    return path


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
