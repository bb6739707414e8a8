"""The tile sizes each attention kernel is launched with, keyed by shape class.

Nothing is tuned at serving time: `python -m gpu_kernels.tune` prints the table these constants
were read from. This file knows no kernel; launchers look their tiles up here.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

GpuClass = Literal["large", "small", "scalar"]
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiles:
    """How decode attention is cut: tokens a tile, warps a program, pipeline stages."""

    tile_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTiles:
    """How prefill attention is cut: (token, head) rows and keys a tile, warps, pipeline stages.

    max_registers caps the registers a thread, where two programs a multiprocessor pay for spills.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def next_power_of_2(number: int) -> int:
    """Smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """Quotient rounded up. Triton's own costs microseconds when called from Python."""
    return -(-number // divisor)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a device; 1 for the CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def gpu_class(device: torch.device) -> GpuClass:
    """The class of GPU that tiles are chosen for; the CPU (interpreter) counts as large.

    Returns:
        "large" with 160 KiB of shared memory a program or more (A100, H100 and newer), "small"
        with less (A10G, L4, RTX), "scalar" where Triton has no matrix instructions (T4, V100).
    """
    if device.type != "cuda":
        return "large"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "scalar"
    return "large" if capability in ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3)) else "small"


def decode_tiles(head_dim: int, dtype: torch.dtype, gpu: GpuClass) -> DecodeTiles:
    """Tiles of paged decode attention for a shape class."""
    if dtype == torch.float32 or gpu == "scalar":
        return DecodeTiles(tile_n=32 if head_dim <= 128 else 16, num_warps=8, num_stages=2)
    if head_dim > 128:
        return DecodeTiles(tile_n=32, num_warps=4, num_stages=2)
    return DecodeTiles(tile_n=64, num_warps=4, num_stages=3)


def prefill_tiles(head_dim: int, dtype: torch.dtype, gpu: GpuClass) -> PrefillTiles:
    """Tiles of paged prefill attention for a shape class."""
    if dtype == torch.float32 or gpu == "scalar":
        tile_n = 32 if head_dim <= 128 else 16
        return PrefillTiles(tile_m=32, tile_n=tile_n, num_warps=8, num_stages=1)
    if gpu == "small":
        tile_n = 64 if head_dim <= 128 else 32
        return PrefillTiles(tile_m=64, tile_n=tile_n, num_warps=4, num_stages=2)
    if head_dim > 128:
        return PrefillTiles(tile_m=128, tile_n=64, num_warps=8, num_stages=2)
    # Two programs a multiprocessor beat one without spills: 486 against 349 TFLOP/s (H200, 8,192
    # tokens).
    return PrefillTiles(tile_m=128, tile_n=64, num_warps=8, num_stages=3, max_registers=128)


def short_prefill_tiles(head_dim: int, dtype: torch.dtype, gpu: GpuClass) -> PrefillTiles:
    """The same for chunks too short to fill the GPU: lower tiles, of which there are more.

    29 instead of 36 µs for 492 tokens that see up to 992, and 99 instead of 123 for as many that
    see up to 3,992 (H200, 32 query and 8 KV heads).
    """
    if dtype == torch.float32 or gpu != "large" or head_dim > 128:
        return prefill_tiles(head_dim, dtype, gpu)
    return PrefillTiles(tile_m=64, tile_n=64, num_warps=4, num_stages=3)


def fills_gpu(num_rows: int, num_sms: int, tiles: PrefillTiles) -> bool:
    """Whether tiles of so many (token, head) rows take most of the places on a GPU.

    Args:
        num_rows: Tokens times query heads.
        num_sms: Multiprocessors of the GPU, with two places each.
        tiles: As of `prefill_tiles`.
    """
    return 4 * num_rows >= 3 * 2 * num_sms * tiles.tile_m


def decode_num_splits(num_seqs: int, num_kv_heads: int, max_seq_len: int, num_sms: int) -> int:
    """Chooses into how many splits decode attention cuts each sequence.

    Two wishes, the larger wins: enough programs to fill the GPU twice, however short the splits
    (down to 64 tokens); and twelve programs a multiprocessor, so that the last wave is a small
    share, while splits stay at 512 tokens or longer.

    Args:
        num_seqs: Rows of the batch.
        num_kv_heads: KV heads; a program owns one of them.
        max_seq_len: Upper bound or estimate of the longest sequence, tokens.
        num_sms: Multiprocessors of the GPU.

    Returns:
        Number of splits, 1 to MAX_SPLITS.
    """
    programs = max(1, num_seqs * num_kv_heads)
    to_fill = min(cdiv(2 * num_sms, programs), cdiv(max_seq_len, 64))
    to_balance = min(cdiv(12 * num_sms, programs), max_seq_len // 512)
    return max(1, min(MAX_SPLITS, max(to_fill, to_balance)))
