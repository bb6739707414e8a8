"""Check the tensors that reach the kernels, before their addresses do.

Every message names the argument, what was expected and what was given.
"""

import torch

HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64)
MAX_GROUP = 16
BELL_WORDS = 16  # a cache line
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def host_kv_shapes(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Return the shapes of one layer's K and V in host layout.

    K is transposed inside its block so that vector lanes run over tokens. Nobody outside this
    package should rely on more than the number of elements and the leading `num_blocks`.

    Returns:
        `[num_blocks, num_kv_heads, head_dim, block_size]` and
        `[num_blocks, num_kv_heads, block_size, head_dim]`.

    Raises:
        ValueError: `head_dim` or `block_size` is not supported.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected one of {HEAD_DIMS}, got {head_dim}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {BLOCK_SIZES}, got {block_size}")
    lead = (num_blocks, num_kv_heads)
    return (*lead, head_dim, block_size), (*lead, block_size, head_dim)


def check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, int, int, int]:
    """Check one layer's K and V; return (num_blocks, num_kv_heads, head_dim, block_size)."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.device.type != "cpu":
            raise ValueError(f"{name}: expected a CPU tensor, got one on {cache.device}")
        if cache.dtype not in DTYPES:
            raise ValueError(f"{name}: expected bfloat16, float16 or float32, got {cache.dtype}")
        if cache.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions, got shape {tuple(cache.shape)}")
        if not cache.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {cache.stride()}")
    num_blocks, num_kv_heads, head_dim, block_size = k_cache.shape
    _, v_shape = host_kv_shapes(num_blocks, num_kv_heads, head_dim, block_size)
    if tuple(v_cache.shape) != v_shape:
        raise ValueError(f"v_cache: expected shape {v_shape}, got {tuple(v_cache.shape)}")
    if v_cache.dtype != k_cache.dtype:
        raise ValueError(f"v_cache: expected {k_cache.dtype} like k_cache, got {v_cache.dtype}")
    return num_blocks, num_kv_heads, head_dim, block_size


def check_pools(
    k_pool: torch.Tensor, v_pool: torch.Tensor, num_layers: int, num_kv_heads: int, head_dim: int
) -> None:
    """Check the K and V of all layers, `[num_layers, ...]`, against a model's shape."""
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.dim() != 5 or pool.shape[0] != num_layers:
            raise ValueError(
                f"{name}: expected 5 dimensions, the first of size {num_layers}, "
                f"got shape {tuple(pool.shape)}"
            )
        if not pool.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {pool.stride()}")
    _, actual_heads, actual_dim, _ = check_cache(k_pool[0], v_pool[0])
    if (actual_heads, actual_dim) != (num_kv_heads, head_dim):
        raise ValueError(
            f"k_pool: expected {num_kv_heads} KV heads of size {head_dim}, "
            f"got {actual_heads} of size {actual_dim}"
        )


def check_rows(
    name: str, rows: torch.Tensor, shape: tuple[int, int, int], dtype: torch.dtype | None = None
) -> None:
    """Check a `[rows, heads, head_dim]` tensor; rows may be apart, heads must be contiguous."""
    if tuple(rows.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(rows.shape)}")
    if rows.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got one on {rows.device}")
    if rows.dtype not in DTYPES:
        raise ValueError(f"{name}: expected bfloat16, float16 or float32, got {rows.dtype}")
    if dtype is not None and rows.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype} like the other rows, got {rows.dtype}")
    if rows.numel() and (rows.stride(2) != 1 or (shape[1] > 1 and rows.stride(1) != shape[2])):
        raise ValueError(
            f"{name}: expected contiguous heads, strides (any, {shape[2]}, 1), got {rows.stride()}"
        )


def check_ints(
    name: str, ints: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    """Check an integer CPU tensor; None in `shape` allows any size, the last stride must be 1."""
    actual = tuple(ints.shape)
    expected = tuple("any" if size is None else size for size in shape)
    if len(actual) != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, actual, strict=True)
    ):
        raise ValueError(f"{name}: expected shape {expected}, got {actual}")
    if ints.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {ints.dtype}")
    if ints.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got one on {ints.device}")
    if ints.numel() and ints.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last stride of 1, got strides {ints.stride()}")


def check_group(num_q_heads: int, num_kv_heads: int) -> None:
    """Check that query heads share KV heads evenly, at most MAX_GROUP each."""
    group, rest = divmod(num_q_heads, num_kv_heads)
    if rest or not 1 <= group <= MAX_GROUP:
        raise ValueError(
            f"q: expected 1 to {MAX_GROUP} query heads for each of {num_kv_heads} KV heads, "
            f"got {num_q_heads} query heads"
        )


def check_buffers(
    rows: torch.Tensor,
    out: torch.Tensor,
    bells: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Check the memory that a device and the attention service share."""
    for name, tensor in (("rows", rows), ("out", out), ("bells", bells)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous, got strides {tensor.stride()}")
    row_size = (num_q_heads + 2 * num_kv_heads) * head_dim
    if rows.dim() != 3 or rows.shape[2] != row_size or not rows.numel():
        raise ValueError(
            f"rows: expected shape (num_lanes, max_rows, {row_size}), got {tuple(rows.shape)}"
        )
    if rows.dtype not in DTYPES:
        raise ValueError(f"rows: expected bfloat16, float16 or float32, got {rows.dtype}")
    out_shape = (*rows.shape[:2], num_q_heads * head_dim)
    if tuple(out.shape) != out_shape or out.dtype != rows.dtype:
        raise ValueError(
            f"out: expected shape {out_shape} of {rows.dtype}, "
            f"got {tuple(out.shape)} of {out.dtype}"
        )
    bells_shape = (rows.shape[0], 2, BELL_WORDS)
    if tuple(bells.shape) != bells_shape or bells.dtype != torch.int32:
        raise ValueError(
            f"bells: expected shape {bells_shape} of torch.int32, "
            f"got {tuple(bells.shape)} of {bells.dtype}"
        )
    if bells.data_ptr() % 64:
        raise ValueError("bells: expected memory aligned to 64 bytes, a cache line")
