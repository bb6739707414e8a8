"""Reads options of `neo bench` that hold lists, pairs or JSON."""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from engine.errors import ConfigError


def listed(numbers: Iterable[float]) -> str:
    """Return numbers as one option writes them."""
    return ",".join(f"{number:g}" for number in numbers)


def items(text: str) -> list[str]:
    """Return what a list in one option holds."""
    return [item.strip() for item in text.split(",") if item.strip()]


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Read a list of numbers.

    Raises:
        ConfigError: One is none.
    """
    found = []
    for item in items(text):
        try:
            found.append(kind(item))
        except ValueError as error:
            raise ConfigError(f"{name} must be a list of numbers, got {item!r}") from error
        if isinstance(found[-1], float) and math.isnan(found[-1]):
            raise ConfigError(f"{name} must be a list of numbers, got {item!r}")
    return tuple(found)


def goodput_limits(given: list[str]) -> dict[str, float] | None:
    """Read METRIC:MILLISECONDS options; None if there are none.

    Raises:
        ConfigError: One is something else.
    """
    limits = {}
    for item in given:
        for part in item.split():
            name, _, limit = part.partition(":")
            try:
                limits[name] = float(limit)
            except ValueError as error:
                raise ConfigError(f"goodput must be METRIC:MILLISECONDS, got {part!r}") from error
    return limits or None


def pairs(name: str, given: list[str]) -> dict[str, str]:
    """Read KEY=VALUE options.

    Raises:
        ConfigError: One is something else.
    """
    found = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ConfigError(f"{name} must be KEY=VALUE, got {item!r}")
        found[key] = value
    return found


def json_object(name: str, text: str | None) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: It is something else.
    """
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} must be a JSON object, got {text!r}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, got {text!r}")
    return value
