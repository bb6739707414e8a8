"""Whether a server answers, and what it calls its model."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import NeoError

_PROBE_TIMEOUT_S = 5.0
_PAUSE_S = 0.5
_NOT_YET = (502, 503, 504)
"""What a server, or a proxy before it, says while it starts. Some know no list of models."""


def fetch_json(url: str, headers: Mapping[str, str]) -> Any:
    """Return what a GET gives, parsed.

    Raises:
        OSError: The server does not answer, or not with success.
        ValueError: It answers something else than JSON.
    """
    request = urllib.request.Request(url, headers=dict(headers))
    with urllib.request.urlopen(request, timeout=_PROBE_TIMEOUT_S) as response:
        return json.loads(response.read())


def answers(base_url: str, headers: Mapping[str, str]) -> bool:
    """Return whether a server is there and has started, whatever it says."""
    try:
        fetch_json(f"{base_url.rstrip('/')}/v1/models", headers)
    except urllib.error.HTTPError as error:
        return error.code not in _NOT_YET
    except ValueError:
        return True
    except OSError:
        return False
    return True


def wait_until_ready(
    base_url: str,
    headers: Mapping[str, str],
    timeout_s: float,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Wait for a server to answer.

    Args:
        base_url: Scheme, host and port.
        headers: Sent along.
        timeout_s: Longest wait; 0 tries once.
        check: Called between tries; may raise to give up.

    Raises:
        NeoError: It does not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while not answers(base_url, headers):
        check()
        if time.monotonic() >= deadline:
            raise NeoError(
                f"no server answers at {base_url} after {timeout_s:g} s; start it, or correct "
                "--base-url or --ready-check-timeout-sec"
            )
        time.sleep(_PAUSE_S)


def served_model(base_url: str, headers: Mapping[str, str]) -> str | None:
    """Return the id of the first model that a server lists; None if it lists none."""
    try:
        content = fetch_json(f"{base_url.rstrip('/')}/v1/models", headers)
    except (OSError, ValueError):
        return None
    models = content.get("data") if isinstance(content, dict) else None
    first = models[0] if isinstance(models, list) and models else None
    return str(first["id"]) if isinstance(first, dict) and "id" in first else None
