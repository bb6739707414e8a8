"""What the profiler makes of its points; the points themselves come from real engines elsewhere."""

from types import SimpleNamespace

import pytest

from engine.kv_blocks import BlockPool
from engine.profiler import Profiler, linear_sizes

TOKEN_S, ROW_S = 1e-6, 2e-6


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "expected_row_s"),
    [
        (3072, 16, 832, 256, ROW_S),
        (54, 16, 832, 256, ROW_S),
        (7, 8, 100, 3, ROW_S),
        # Requests are so short, or so few fit, that rows cannot be told from tokens.
        (32, 16, 21, 32, 0.0),
        (1000, 64, 70, 256, 0.0),
        (5, 16, 40, 8, 0.0),
        (2, 16, 2, 2, 0.0),
        (1, 16, 16, 4, 0.0),
    ],
)
def test_decode_attention_is_told_apart_by_tokens_and_rows(
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    expected_row_s: float,
    monkeypatch,
) -> None:
    pool, seen = BlockPool(num_blocks, block_size), []

    def point(self: Profiler, kind: str, num_seqs: int, length: int) -> float:
        assert 1 <= length < max_model_len
        assert num_seqs * pool.blocks_for(length) <= num_blocks
        assert num_seqs <= max_num_seqs
        seen.append((num_seqs, length))
        return num_seqs * (length * TOKEN_S + ROW_S)

    monkeypatch.setattr(Profiler, "_decode_point", point)
    profiler = Profiler(
        SimpleNamespace(config=SimpleNamespace(num_layers=1)),
        None,
        pool,
        pool,
        max_num_batched_tokens=max_num_seqs,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )
    table, row_s = profiler._decode_attention("cdec")
    assert row_s == pytest.approx(expected_row_s)
    for num_seqs, length in list(seen):
        predicted = table(num_seqs * length) + num_seqs * row_s
        assert predicted == pytest.approx(point(profiler, "cdec", num_seqs, length), rel=0.15)


@pytest.mark.parametrize(
    ("most", "tiled", "expected"),
    [
        (1, True, [1]),
        (4, False, [1, 2, 4]),
        (100, True, [1, 8, 16, 32, 64, 100]),
        (832, False, [1, 8, 16, 32, 64, 128, 256, 512, 832]),
        (832, True, [1, 8, 16, 32, 64, 128, 256, 384, 512, 640, 768, 832]),
        (4096, True, [1, 8, 16, 32, 64, *range(128, 1025, 128), 2048, 4096]),
    ],
)
def test_linear_layers_are_timed_tile_by_tile_where_there_are_tiles(most, tiled, expected) -> None:
    assert linear_sizes(most, tiled=tiled) == expected
