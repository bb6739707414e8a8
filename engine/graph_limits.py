"""Which steps are launched as one CUDA graph, and how many rows it has.

The runner captures them, the scheduler fills them, and predictions must agree.
"""

MAX_GRAPH_TOKENS = 1024
"""Most tokens of a sub-batch that is captured. Longer ones keep a GPU busy for longer than their
launching takes: 1,024 rows of Llama-3-8B take an H200 18 ms, launching them kernel by kernel 14."""

MAX_STAGED_TOKENS = 4096
"""Most tokens of prompts that go to the host, with what was computed of them before."""

TILE_ROWS = 128
"""Steps with prompts have whole tiles of rows, as matrix products do. Between them these may be
worse than with more: Llama-3-8B's gate and up projection takes an H200 160 µs for 512 rows, but
266 µs for 448 and 271 µs for 552 (cuBLAS 13)."""

USUAL_DECODES = (8, 24)
"""Room for decodes beside rotating rows. With 8 of these, 24 make 32 rows: beyond, linear layers of
a GPU take other kernels, and a step 1 ms of 5.6 longer (Llama-3-8B, H200)."""

PROMPT_VISITORS = 8
"""Least room for rotating rows in a layer, beside prompts: the more steps share a graph."""


def whole_tiles(num_rows: int) -> int:
    """Return the most rows of a step with prompts that may have so many."""
    return num_rows if num_rows < 2 * TILE_ROWS else num_rows // TILE_ROWS * TILE_ROWS


def padded_tiles(num_rows: int) -> int:
    """Return the rows of a graph with prompts: more for a few, whole tiles for many."""
    tile = TILE_ROWS // 2 if num_rows <= 2 * TILE_ROWS else TILE_ROWS
    return -(-num_rows // tile) * tile


def prompt_room(num_rows: int, num_decodes: int, num_visitors: int) -> int:
    """Return the tokens of prompts that fill a graph in which rows rotate.

    Args:
        num_rows: Of the step.
        num_decodes: On the device.
        num_visitors: Rotating rows that are in a layer together.
    """
    if num_rows < 2 * TILE_ROWS:
        return num_rows - num_decodes - num_visitors
    return num_rows - _room_beside_prompts(num_decodes, num_visitors)


def mixed_rows(num_prompt_tokens: int, num_decodes: int, num_visitors: int) -> int:
    """Return the rows of a graph with prompts in which rows rotate.

    Args:
        num_prompt_tokens: Of the step.
        num_decodes: On the device.
        num_visitors: Rotating rows that are in a layer together.
    """
    return padded_tiles(num_prompt_tokens + _room_beside_prompts(num_decodes, num_visitors))


def _room_beside_prompts(num_decodes: int, num_visitors: int) -> int:
    """Return the rows beside prompts and rotating rows, and of these."""
    eights = -(-num_decodes // 8) * 8
    decodes = next((room for room in USUAL_DECODES if room >= num_decodes), eights)
    return decodes + max(
        PROMPT_VISITORS, 1 << (num_visitors - 1).bit_length() if num_visitors else 0
    )
