"""Argument checks shared by all launchers: a failure names argument, expected and got.

The checks read shapes, strides and types only: never a value on the device, so they neither
synchronise nor break the capture of a CUDA graph.
"""

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require(condition: bool, name: str, expected: object, got: object) -> None:
    """Raises ValueError naming the argument unless the condition holds.

    Args:
        condition: What must be true.
        name: The argument's name as the caller knows it.
        expected: What would have been right.
        got: What was passed.

    Raises:
        ValueError: The condition is false.
    """
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Checks a tensor's shape (None matches any length), dtype and device.

    Raises:
        ValueError: One of the three differs.
    """
    got = tensor.shape
    matches = len(got) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, got, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(got)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Checks that a tensor holds one of the supported floating-point types.

    Raises:
        ValueError: It does not.
    """
    require(tensor.dtype in FLOAT_DTYPES, name, "bfloat16, float16 or float32", tensor.dtype)


def check_dense_rows(name: str, tensor: torch.Tensor) -> None:
    """Checks that all dimensions but the first are contiguous; the row stride is free.

    A slice of a fused projection passes: rows may lie further apart than they are long.

    Raises:
        ValueError: The elements of one row are not contiguous.
    """
    expected = 1
    for length, stride in zip(
        reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True
    ):
        if length != 1 and stride != expected:
            raise ValueError(f"{name}: expected contiguous rows, got strides {tensor.stride()}")
        expected *= length


def check_pool(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_kv_heads: int,
    head_dim: int,
    like: torch.Tensor,
) -> int:
    """Checks one layer's device pool slices and returns their block size.

    Args:
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], token-major; blocks may lie
            further apart than they are long.
        v_cache: Same shape and strides as k_cache.
        num_kv_heads: Expected number of KV heads.
        head_dim: Expected elements a head.
        like: Tensor whose dtype and device the pool must share.

    Returns:
        block_size, a multiple of 16.

    Raises:
        ValueError: Shape, strides, dtype or device do not fit.
    """
    shape = (None, num_kv_heads, None, head_dim)
    check_tensor("k_cache", k_cache, shape, like.dtype, like.device)
    check_tensor("v_cache", v_cache, k_cache.shape, like.dtype, like.device)
    check_dense_rows("k_cache", k_cache)
    same_strides = v_cache.stride() == k_cache.stride()
    require(same_strides, "v_cache strides", k_cache.stride(), v_cache.stride())
    block_size = k_cache.shape[2]
    is_multiple = block_size > 0 and block_size % 16 == 0
    require(is_multiple, "k_cache block_size", "a multiple of 16", block_size)
    return block_size


def check_heads(num_q_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Checks the head counts and returns the group size (query heads a KV head).

    Raises:
        ValueError: The group size is not an integer from 1 to 16, or head_dim is not a multiple
            of 8 up to 256.
    """
    divides = num_kv_heads > 0 and num_q_heads % num_kv_heads == 0
    require(divides, "num_q_heads", f"a multiple of num_kv_heads={num_kv_heads}", num_q_heads)
    group_size = num_q_heads // num_kv_heads
    require(1 <= group_size <= 16, "group size num_q_heads/num_kv_heads", "1 to 16", group_size)
    is_supported = 16 <= head_dim <= 256 and head_dim % 8 == 0
    require(is_supported, "head_dim", "a multiple of 8 from 16 to 256", head_dim)
    return group_size
