"""The life of a server: listen, load, serve, drain, leave."""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import uvicorn
import uvloop

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.prompt_encoder import load_prompt_encoder
from engine.server.api_errors import unavailable
from engine.server.app import make_app
from engine.server.engine_client import EngineClient
from engine.server.logs import configure_logging
from engine.server.metrics import Metrics
from engine.server.server_config import ServerConfig
from engine.server.service import Service

INTERRUPTED = 130
FAILED = 1

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
"""Longer than what load balancers usually keep a connection without using it."""

_FLUSH_S = 5
"""Time for clients to take what has been generated for them."""

_POLL_S = 0.05
_logger = logging.getLogger("neo.server")


def run_server(
    engine_config: EngineConfig,
    config: ServerConfig,
    *,
    on_progress: Callable[[str], None],
    on_ready: Callable[[str], None],
) -> int:
    """Serve until a signal comes.

    Args:
        engine_config: The engine's options.
        config: The server's options.
        on_progress: Told what is going on while the engine starts.
        on_ready: Told once, in one line, where the server is and how long its start took.

    Returns:
        The exit code: 0 after SIGTERM, 130 after Ctrl-C, 1 if requests had to be cut off.

    Raises:
        NeoError: The server cannot start, or its engine died.
    """
    configure_logging(config.log_json)
    return uvloop.run(_Server(engine_config, config, on_progress, on_ready).run())


class _Server:
    """One run of the server."""

    def __init__(
        self,
        engine_config: EngineConfig,
        config: ServerConfig,
        on_progress: Callable[[str], None],
        on_ready: Callable[[str], None],
    ) -> None:
        self._start_s = time.monotonic()
        self._engine_config = engine_config
        self._config = config
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._signal = 0
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def run(self) -> int:
        sock = listen(self._config.host, self._config.port)
        _raise_file_limit()
        metrics = Metrics()
        self._engine = EngineClient(metrics)
        await self._engine.launch(self._config.log_json)
        self._service = Service(self._config, self._engine, metrics)
        self._http = _HttpServer(_uvicorn_config(self._service))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._http.serve(sockets=[sock]))
        loading = asyncio.create_task(self._load(sock))
        try:
            await self._wait(loading)
            was_cut = await self._drain()
        finally:
            loading.cancel()
            self._http.should_exit = True
            await serving
            await self._engine.stop()
        if self._engine.error is not None:
            raise self._engine.error
        if was_cut:
            return FAILED
        return INTERRUPTED if self._signal == signal.SIGINT else 0

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            self._stop_now.set()
            self._http.force_exit = True
        self._signal = self._signal or number
        self._stop.set()

    async def _load(self, sock: socket.socket) -> None:
        config = self._engine_config
        # First here, so that only one process downloads or converts the model.
        checkpoint = await asyncio.to_thread(_open_checkpoint, config, self._on_progress)
        (encoder, ready) = await asyncio.gather(
            asyncio.to_thread(load_prompt_encoder, checkpoint, config.load_format),
            self._engine.load(config, self._on_progress),
        )
        self._service.open(ready, checkpoint.name, encoder)
        gc.collect()
        gc.freeze()
        seconds = time.monotonic() - self._start_s
        parts = ", ".join(
            f"{phase} {spent:.1f}" for phase, spent in ready.phases.items() if spent >= 0.05
        )
        name = self._service.model_names[0]
        self._on_ready(f"serving {name} at {url(sock)} (ready after {seconds:.1f} s: {parts})")
        if _is_public(sock) and not self._config.api_keys:
            _logger.warning("other machines can reach this server, and it asks for no --api-key")

    async def _wait(self, loading: asyncio.Task[None]) -> None:
        """Wait for a reason to end: a signal, or the end of the engine.

        Raises:
            NeoError: The server cannot start.
        """
        ends = [_task(self._stop.wait()), _task(self._engine.gone.wait())]
        try:
            await asyncio.wait([loading, *ends], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()

    async def _drain(self) -> bool:
        """Let running requests end, and return whether some had to be cut off."""
        self._service.is_draining = True
        engine = self._engine
        deadline = time.monotonic() + self._config.shutdown_timeout_s
        if engine.num_live:
            _logger.info("draining", extra={"running_requests": engine.num_live})
        while engine.num_live and time.monotonic() < deadline and not self._stop_now.is_set():
            await asyncio.sleep(_POLL_S)
        if not engine.num_live:
            return False
        _logger.warning("cutting off requests", extra={"running_requests": engine.num_live})
        engine.fail_all(unavailable("the server is shutting down"))
        return True


class _HttpServer(uvicorn.Server):
    """uvicorn, but for its own idea of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to `_Server`."""
        yield


def _uvicorn_config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service),
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FLUSH_S,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: The address is taken or not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another "
            "--host or --port"
        ) from error
    return sock


def url(sock: socket.socket) -> str:
    """Return where a listening socket can be reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_public(sock: socket.socket) -> bool:
    host = sock.getsockname()[0]
    return not (host.startswith("127.") or host == "::1")


def _open_checkpoint(config: EngineConfig, on_progress: Callable[[str], None]) -> Checkpoint:
    return open_checkpoint(
        config.model,
        load_format=config.load_format,
        revision=config.revision,
        progress=lambda done, total: on_progress(
            f"converting the default model, once: {done} of {total} tensors"
        ),
    )


def _raise_file_limit() -> None:
    """Allow as many connections as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _task(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(coroutine)
