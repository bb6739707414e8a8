"""What the server was asked to do, checked once."""

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.tool_calls import FORMATS


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of the HTTP side; the command line takes its defaults from here.

    Args:
        host: Address to listen on.
        port: TCP port; 0 takes a free one.
        served_model_names: What requests may call the model; empty is the model's own name.
        api_keys: One of them must come with every request, except to `/health` and `/`; empty
            lets everyone in.
        max_queue: Most requests that may wait for their turn; those beyond get status 429.
        request_timeout_s: Time for a request from its arrival to its last token; None is no limit.
        shutdown_timeout_s: Time for running requests to end after SIGTERM or Ctrl-C.
        max_body_mb: Most MiB of a request's body.
        tool_call_parser: How the model writes calls of functions, one of
            `engine.tool_calls.FORMATS`; None finds it out from the chat template.
        log_json: Log one JSON object a line.

    Raises:
        ConfigError: A value is out of range; the message names the option.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    max_queue: int = 4096
    request_timeout_s: float | None = None
    shutdown_timeout_s: float = 30.0
    max_body_mb: float = 16.0
    tool_call_parser: str | None = None
    log_json: bool = False

    def __post_init__(self) -> None:
        self._check(bool(self.host), "host", "an address", self.host)
        self._check(0 <= self.port <= 65535, "port", "from 0 to 65535", self.port)
        self._check(self.max_queue >= 0, "max_queue", "at least 0", self.max_queue)
        self._check(
            self.request_timeout_s is None or self.request_timeout_s > 0,
            "request_timeout",
            "above 0",
            self.request_timeout_s,
        )
        self._check(
            self.shutdown_timeout_s >= 0,
            "shutdown_timeout",
            "at least 0",
            self.shutdown_timeout_s,
        )
        self._check(self.max_body_mb > 0, "max_body_mb", "above 0", self.max_body_mb)
        self._check(all(self.served_model_names), "served_model_name", "not empty", "an empty name")
        self._check(
            self.tool_call_parser is None or self.tool_call_parser in FORMATS,
            "tool_call_parser",
            f"one of {', '.join(FORMATS)}",
            self.tool_call_parser,
        )
        is_usable = all(key and key.isascii() and key.isprintable() for key in self.api_keys)
        # The key itself is a secret, so the message does not show it.
        self._check(is_usable, "api_key", "printable ASCII, not empty", "something else")

    @property
    def max_body_bytes(self) -> int:
        """The limit in bytes."""
        return int(self.max_body_mb * 2**20)

    @staticmethod
    def _check(ok: bool, name: str, expected: str, got: object) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {expected}, got {got}")
