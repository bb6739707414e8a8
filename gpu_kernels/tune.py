"""Tries lists of tile sizes for the attention kernels and prints what each costs.

`python -m gpu_kernels.tune [decode|prefill] [head_dim]` prints a table; the constants in `tiles`
are read from it by hand. Never runs at serving time.
"""

import itertools
import sys
import time
from dataclasses import asdict

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from gpu_kernels.bench_inputs import Heads, causal_flops, decode_input_sets, make_paged_inputs
from gpu_kernels.tiles import DecodeTiles, PrefillTiles
from gpu_kernels.timing import Launch, median_us

DECODE_SHAPES = ((24, 1100), (64, 4000), (1, 1100), (8, 1100), (1, 30_000), (256, 1000))
PREFILL_SHAPES = ((1, 8192, 8192), (4, 2048, 2048), (1, 8192, 1024), (24, 1000, 1000))
DECODE_TILES = [
    DecodeTiles(tile_n=tile_n, num_warps=num_warps, num_stages=num_stages)
    for tile_n, num_warps, num_stages in (
        (32, 4, 3), (32, 4, 5), (32, 2, 3), (64, 4, 2), (64, 4, 3), (64, 4, 5), (64, 2, 3),
        (64, 8, 3), (128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3), (256, 8, 2),
    )
]  # fmt: skip
PREFILL_TILES = [
    PrefillTiles(
        tile_m=tile_m, tile_n=tile_n, num_warps=num_warps, num_stages=num_stages, max_registers=cap
    )
    for tile_m, tile_n, num_warps, num_stages, cap in (
        (128, 64, 8, 2, None), (128, 64, 8, 3, None), (128, 64, 8, 5, None),
        (128, 64, 8, 2, 128), (128, 64, 8, 3, 128), (128, 128, 8, 2, None),
        (128, 128, 8, 3, None), (128, 128, 8, 5, None), (128, 32, 8, 2, 128),
        (64, 64, 4, 2, None), (64, 64, 4, 3, None), (64, 128, 4, 2, None),
        (256, 64, 16, 2, None), (256, 64, 16, 3, None), (256, 128, 16, 2, None),
    )
]  # fmt: skip


def split_counts(num_seqs: int, seq_len: int) -> list[int]:
    """Splits worth trying: at least 64 tokens each, and no more than 8,192 programs."""
    counts = (1, 2, 3, 4, 6, 8, 16, 32, 64)
    return [s for s in counts if seq_len // s >= 64 and num_seqs * 8 * s <= 8192]


def try_us(launches: list[Launch], rounds: int) -> float | None:
    """Median time, or None where the tiles do not fit the GPU."""
    try:
        return median_us(launches, rounds=rounds, replays=5)
    except (OutOfResources, PTXASError):
        return None


def brief(tiles: DecodeTiles | PrefillTiles) -> str:
    """The tiles' fields as name and number."""
    return " ".join(f"{name} {value}" for name, value in asdict(tiles).items() if value)


def tune_decode(heads: Heads, device: torch.device) -> None:
    """Prints the ten best tiles and splits of each shape."""
    for num_seqs, seq_len in DECODE_SHAPES:
        sets = decode_input_sets(heads, num_seqs, seq_len, device)
        chosen = median_us([inputs.decode() for inputs in sets])
        terabytes = heads.kv_bytes(num_seqs * seq_len) / 1e12
        print(f"\ndecode {num_seqs} x {seq_len}: chosen in code {chosen:.1f} us")
        results = []
        for tiles, splits in itertools.product(DECODE_TILES, split_counts(num_seqs, seq_len)):
            launches = [inputs.decode(splits, tiles) for inputs in sets]
            if (us := try_us(launches, rounds=2)) is not None:
                results.append((us, splits, tiles))
        for us, splits, tiles in sorted(results, key=lambda result: result[0])[:10]:
            print(
                f"{us:9.1f} us {terabytes / us * 1e6:6.2f} TB/s  splits {splits:2}  {brief(tiles)}"
            )
        del sets


def tune_prefill(heads: Heads, device: torch.device) -> None:
    """Prints all tiles of each shape, best first."""
    for num_seqs, seq_len, num_new in PREFILL_SHAPES:
        inputs = make_paged_inputs(heads, num_seqs, seq_len, num_new, device)
        flops = causal_flops(heads, num_seqs, seq_len, num_new)
        chosen = median_us([inputs.prefill()])
        print(f"\nprefill {num_seqs} x {num_new} of {seq_len}: chosen in code {chosen:.1f} us")
        results = []
        for tiles in PREFILL_TILES:
            if (us := try_us([inputs.prefill(tiles)], rounds=4)) is not None:
                results.append((us, tiles))
        for us, tiles in sorted(results, key=lambda result: result[0]):
            print(f"{us:9.1f} us {flops / us / 1e6:6.0f} TFLOP/s  {brief(tiles)}")


def main() -> None:
    """Runs one tuner or both, for Llama-3-8B's head counts."""
    which = sys.argv[1] if len(sys.argv) > 1 else "both"
    heads = Heads(head_dim=int(sys.argv[2]) if len(sys.argv) > 2 else 128)
    device = torch.device("cuda", torch.cuda.current_device())
    start = time.perf_counter()
    if which in ("prefill", "both"):
        tune_prefill(heads, device)
    if which in ("decode", "both"):
        tune_decode(heads, device)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
