"""What `/openapi.json` says is what the server does: schemathesis tries it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import Serve

pytestmark = [pytest.mark.ispc, pytest.mark.slow]

NOT_IN_A_SCHEMA = "positive_data_acceptance"
"""A schema cannot say which token ids a vocabulary has, or which fields exclude each other."""


def test_no_crash_and_no_answer_that_the_document_does_not_allow(
    serve: Serve, tmp_path: Path
) -> None:
    with serve("--max-model-len", 32) as server:  # so that no answer takes long
        run = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
                *("--phases", "coverage", "--seed", "1", "--exclude-checks", NOT_IN_A_SCHEMA),
                *("--continue-on-failure", "--no-color", "--request-timeout", "300"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert "11 selected / 11 total" in run.stdout
        assert server.metric("neo:failed_steps_total") == 0
        assert "Traceback" not in server.log_text()
