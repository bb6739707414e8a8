"""Where the engine process begins.

The process that starts it has to import what it starts, and the HTTP process has no use for torch;
so everything heavy is imported once the engine process runs.
"""

import socket


def engine_entry(sock: socket.socket, spawned_s: float, log_json: bool) -> None:
    """Be the engine process; see `run_engine`."""
    from engine.server.engine_process import run_engine  # noqa: PLC0415 (torch)

    run_engine(sock, spawned_s, log_json)
