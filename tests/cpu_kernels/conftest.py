from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_kernels.attention import CpuAttention
from cpu_kernels.build import build
from engine.paths import writable_cache_dir


@pytest.fixture(scope="session")
def kernel_cache() -> Path:
    """The user's own cache folder, with the kernels built in it."""
    cache_dir = writable_cache_dir()
    build(cache_dir)
    return cache_dir


@pytest.fixture(scope="session")
def attention(kernel_cache: Path) -> Iterator[CpuAttention]:
    with CpuAttention(kernel_cache, 2) as attention:
        yield attention
