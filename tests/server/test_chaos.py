"""Clients that come, leave and time out; `tests.server.chaos` runs the same at length."""

from pathlib import Path

import pytest

from tests.server.chaos import MODES, run_chaos

pytestmark = [pytest.mark.ispc, pytest.mark.slow]

FLAT_BYTES = 64 * 2**20
NUM_REQUESTS = 80


@pytest.mark.parametrize("mode", MODES)
def test_no_token_is_lost_or_doubled_and_no_block_kept(
    tiny_folder: Path, tmp_path: Path, mode: str
) -> None:
    facts = run_chaos(tiny_folder, tmp_path / "log", mode, NUM_REQUESTS)
    assert facts["grown_bytes"] < FLAT_BYTES
    assert facts["refused"] > 0
    if mode in ("asymmetric", "overlap"):
        assert facts["host rows"] > 0
        assert facts["swapped bytes"] > 0
    else:
        assert mode == "auto" or facts["preemptions"] > 0
