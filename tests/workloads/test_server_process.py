import os
import sys
import time
from pathlib import Path

import pytest

from engine.errors import NeoError
from workloads.drivers.server_process import free_port, running

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_is_stopped_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    with running([sys.executable, "-c", PARENT], log) as process:
        wait_for(lambda: log.read_text().strip())
        child = int(log.read_text())
        process.check()
        assert is_alive(child)
    wait_for(lambda: not is_alive(child))


def test_a_server_that_ended_says_its_last_words(tmp_path: Path) -> None:
    program = "import sys; print('starting'); sys.exit('no such model')"
    with running([sys.executable, "-c", program], tmp_path / "log") as process:
        wait_for(lambda: not process.is_running)
        with pytest.raises(NeoError, match=r"code 1: starting \| no such model"):
            process.check()


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(NeoError, match="cannot start no-such-program"),
        running(["no-such-program"], tmp_path / "log"),
    ):
        pass


def test_free_ports_can_be_taken() -> None:
    assert 0 < free_port() < 65536
