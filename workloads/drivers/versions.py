"""Versions that a result depends on."""

from importlib import metadata

_PACKAGES = ("neo-llm", "torch", "triton", "transformers", "vllm", "aiohttp")


def package_versions() -> dict[str, str]:
    """Return the installed ones of the packages that matter here."""
    found = {}
    for name in _PACKAGES:
        version = package_version(name)
        if version is not None:
            found[name] = version
    return found


def package_version(name: str) -> str | None:
    """Return an installed package's version, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
