"""A real `neo serve` in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

_READY = re.compile(r"neo: serving (\S+) at (http://\S+) \(ready after [\d.]+ s: .*\)\n")


class RunningServer:
    """Starts at once; ready after `wait_ready`, or in a `with` block."""

    def __init__(self, log: Path, *arguments: object, env: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "neo_cli.main", "serve", *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(env or {})},
            )
        self.model = ""
        self.url = ""

    def wait_ready(self) -> "RunningServer":
        line = self.process.stdout.readline()
        match = _READY.fullmatch(line)
        assert match, f"{line!r}, exit {self.process.poll()}: {self.log_text()}"
        self.model, self.url = match.groups()
        return self

    @property
    def engine_pid(self) -> int:
        """The one process among the children that is no resource tracker."""
        # Threads of the server may end meanwhile, and with them their folders in /proc.
        children = psutil.Process(self.process.pid).children()
        [pid] = [child.pid for child in children if b"spawn_main" in _command_line(child.pid)]
        return pid

    def log_text(self) -> str:
        return self._log.read_text()

    def resident_bytes(self) -> int:
        """Of HTTP process and engine process together."""
        return sum(_resident_bytes(pid) for pid in (self.process.pid, self.engine_pid))

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self._call(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        return self._call(urllib.request.Request(self.url + path, data, headers))

    def _call(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, _parsed(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parsed(error)

    def metric(self, name: str, *, authorization: str = "", **labels: str) -> float:
        """The value of a metric, summed over the labels that are not given."""
        status, text = self.get("/metrics", authorization=authorization)
        assert status == 200
        found = []
        for line in text.splitlines():
            match = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name:
                own = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
                if labels.items() <= own.items():
                    found.append(float(match[3]))
        assert found, f"there is no metric {name} {labels}"
        return sum(found)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal, wait for the end and return the exit code."""
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 60) -> int:
        killer = threading.Timer(timeout, self.process.kill)
        killer.start()
        try:
            return self.process.wait()
        finally:
            killer.cancel()
            self.process.stdout.close()

    def __enter__(self) -> "RunningServer":
        try:
            return self.wait_ready()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self.process.stdout.close()


def _parsed(answer: Any) -> Any:
    text = answer.read().decode()
    return json.loads(text) if answer.headers.get_content_type() == "application/json" else text


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
