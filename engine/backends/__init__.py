"""The seam between the engine and its kernels: the only place that imports a kernel package."""

from engine.backends.base import (
    AttentionShape,
    Backend,
    DeviceMark,
    HostPoolSize,
    HostStepTimes,
    LayerNorms,
    NextNorm,
    NormedRows,
    SlottedTokens,
)
from engine.backends.select import make_backend, resolve_device

__all__ = [
    "AttentionShape",
    "Backend",
    "DeviceMark",
    "HostPoolSize",
    "HostStepTimes",
    "LayerNorms",
    "NextNorm",
    "NormedRows",
    "SlottedTokens",
    "make_backend",
    "resolve_device",
]
