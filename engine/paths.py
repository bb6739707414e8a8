"""Where NEO keeps what it makes: built kernels, converted models, cost tables."""

import os
from pathlib import Path

from engine.errors import ConfigError


def cache_dir() -> Path:
    """Return NEO's cache folder: `$NEO_CACHE_DIR`, else `$XDG_CACHE_HOME/neo`, else `~/.cache/neo`.

    The folder is not created here; see `writable_cache_dir`.
    """
    if explicit := os.environ.get("NEO_CACHE_DIR"):
        return Path(explicit).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "neo"


def writable_cache_dir() -> Path:
    """Return the cache folder after making sure that files can be created in it.

    Raises:
        ConfigError: The folder cannot be created or written.
    """
    path = cache_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write to the cache folder {path}: {error.strerror}; "
            "set NEO_CACHE_DIR to a folder you can write to"
        ) from error
    return path
