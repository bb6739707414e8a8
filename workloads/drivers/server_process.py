"""A server as a process of its own: started, watched, and stopped with all its children."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.errors import NeoError

_STOP_TIMEOUT_S = 20.0
_LOG_LINES_SHOWN = 3


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A running server.

    Args:
        command: Program and arguments.
        log: Its output goes here.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # so that its children can be stopped with it
                )
            except OSError as error:
                raise NeoError(f"cannot start {command[0]}: {error.strerror}") from error

    def check(self) -> None:
        """Check that it runs.

        Raises:
            NeoError: It has ended; the message carries its last words.
        """
        code = self._process.poll()
        if code is not None:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            last = " | ".join(line.strip() for line in lines[-_LOG_LINES_SHOWN:])
            raise NeoError(f"the server ended with code {code}: {last} (all of it: {self._log})")

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it and its children: kindly first, then by force."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # children that outlived it


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[ServerProcess]:
    """Start a server and stop it whatever happens."""
    process = ServerProcess(command, log)
    try:
        yield process
    finally:
        process.stop()
