"""Argument checks shared by all launchers: a failure names argument, expected and got.

The checks read shapes, strides and types only: never a value on the device, so they neither
synchronise nor break the capture of a CUDA graph. They run on every launch, so the path on which
all is well builds no strings and makes no loops.
"""

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Shape = tuple[int | None, ...]


def wrong(name: str, expected: object, got: object) -> ValueError:
    """The error of a wrong argument, to be raised by the caller."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(
    name: str, tensor: torch.Tensor, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    """Checks a tensor's shape (None matches any length), dtype and device.

    Raises:
        ValueError: One of the three differs.
    """
    if tensor.shape != shape and not _matches(tensor.shape, shape):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise wrong(name, f"shape [{wanted}]", list(tensor.shape))
    if tensor.dtype is not dtype:
        raise wrong(name, f"dtype {dtype}", tensor.dtype)
    if tensor.device != device:
        raise wrong(name, f"device {device}", tensor.device)


def _matches(got: torch.Size, shape: Shape) -> bool:
    """Whether every length that is not None agrees."""
    if len(got) != len(shape):
        return False
    return all(want is None or want == have for want, have in zip(shape, got, strict=True))


def check_float(name: str, tensor: torch.Tensor, num_dims: int) -> None:
    """Checks that a tensor holds a supported floating-point type and has so many dimensions.

    Raises:
        ValueError: It does not.
    """
    if tensor.dtype not in FLOAT_DTYPES:
        raise wrong(name, "dtype bfloat16, float16 or float32", tensor.dtype)
    if tensor.dim() != num_dims:
        raise wrong(name, f"{num_dims} dimensions", list(tensor.shape))


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Checks that a tensor is contiguous.

    Raises:
        ValueError: It is not.
    """
    if not tensor.is_contiguous():
        raise wrong(name, "a contiguous tensor", f"strides {tensor.stride()}")


def check_dense_rows(name: str, tensor: torch.Tensor) -> None:
    """Checks that all dimensions but the first are contiguous; the row stride is free.

    A slice of a fused projection passes: rows may lie further apart than they are long.

    Raises:
        ValueError: The elements of one row are not contiguous.
    """
    if tensor.is_contiguous():
        return
    stride, shape = tensor.stride(), tensor.shape
    expected = 1
    for dim in range(len(shape) - 1, 0, -1):
        if shape[dim] != 1 and stride[dim] != expected:
            raise wrong(name, "contiguous rows", f"strides {stride}")
        expected *= shape[dim]


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
    dtype, device = like.dtype, like.device
    check_tensor("k_cache", k_cache, (None, num_kv_heads, None, head_dim), dtype, device)
    check_tensor("v_cache", v_cache, k_cache.shape, dtype, device)
    check_dense_rows("k_cache", k_cache)
    if v_cache.stride() != k_cache.stride():
        raise wrong("v_cache", f"strides {k_cache.stride()}", v_cache.stride())
    block_size = k_cache.shape[2]
    if block_size == 0 or block_size % 16 != 0:
        raise wrong("k_cache block_size", "a multiple of 16", block_size)
    return block_size


def check_heads(num_q_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Checks the head counts and returns the group size (query heads a KV head).

    Raises:
        ValueError: The group size is not an integer from 1 to 16, or head_dim is not a multiple
            of 8 from 16 to 256.
    """
    if num_kv_heads == 0 or num_q_heads % num_kv_heads != 0:
        raise wrong("num_q_heads", f"a multiple of num_kv_heads={num_kv_heads}", num_q_heads)
    group_size = num_q_heads // num_kv_heads
    if not 1 <= group_size <= 16:
        raise wrong("group size num_q_heads/num_kv_heads", "1 to 16", group_size)
    if not 16 <= head_dim <= 256 or head_dim % 8 != 0:
        raise wrong("head_dim", "a multiple of 8 from 16 to 256", head_dim)
    return group_size
