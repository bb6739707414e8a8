"""Both attention kernels on a GPU against the float32 oracle, over the house-style cases."""

from collections.abc import Callable

import pytest
import torch

from gpu_kernels.decode_attention import paged_decode_attention
from gpu_kernels.merge_splits import paged_decode_workspace_size
from gpu_kernels.prefill_attention import paged_prefill_attention
from gpu_kernels.tiles import PrefillTiles, gpu_class, prefill_tiles, short_prefill_tiles
from tests.gpu_kernels.gpu import DTYPES, MARKS
from tests.gpu_kernels.inputs import PagedBatch, make_paged_batch, random_rows
from tests.gpu_kernels.kernel_checks import (
    check_decode,
    check_host_pool_attention,
    check_prefill,
    poisoned,
)

pytestmark = MARKS

HEAD_DIMS = [64, 80, 96, 128, 256]
GROUP_SIZES = [1, 3, 4, 8, 16]
DECODE_LENGTHS = {
    "one": [1],
    "around_a_block": [15, 16, 17],
    "around_a_tile": [63, 64, 65, 127, 128, 129],
    "long": [3001],
    "mixed": [1, 700, 0, 16, 2049, 33, 0, 128],
    "padding_only": [0, 0, 0],
}
PREFILL_LENGTHS = {
    "one": [(0, 1)],
    "around_a_block": [(0, 15), (0, 16), (0, 17)],
    "around_a_tile": [(0, 31), (0, 32), (0, 33), (0, 127), (0, 128), (0, 129)],
    "long": [(0, 1500)],
    "prefix": [(1000, 200), (16, 16), (127, 130)],
    "mixed_with_decodes": [(0, 300), (500, 1), (0, 0), (64, 7), (129, 1), (0, 1)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", DECODE_LENGTHS.values(), ids=DECODE_LENGTHS.keys())
@pytest.mark.parametrize("num_splits", [None, 1, 7])
def test_decode_lengths(lengths: list[int], num_splits: int | None, dtype: torch.dtype) -> None:
    check_decode(lengths, head_dim=128, dtype=dtype, num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    for num_splits in (1, 3):
        check_decode([1, 200, 33], head_dim=head_dim, dtype=dtype, num_splits=num_splits)
    check_decode([2500], head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("lengths", DECODE_LENGTHS.values(), ids=DECODE_LENGTHS.keys())
def test_attention_over_pcie(lengths: list[int], pinned: bool, dtype: torch.dtype) -> None:
    check_host_pool_attention(lengths, head_dim=128, dtype=dtype, pinned=pinned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_over_pcie_sizes(head_dim: int, dtype: torch.dtype) -> None:
    for group_size, block_size in ((1, 16), (8, 32), (16, 64)):
        check_host_pool_attention(
            [1, 200, 33], group_size=group_size, head_dim=head_dim, block_size=block_size,
            num_programs=32, dtype=dtype, pinned=True,
        )  # fmt: skip


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_decode_group_sizes(group_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check_decode([1, 300, 17], group_size=group_size, dtype=dtype, num_splits=2)


@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_decode_block_sizes(block_size: int) -> None:
    lengths = [block_size - 1, block_size, block_size + 1, 500]
    check_decode(lengths, block_size=block_size, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", PREFILL_LENGTHS.values(), ids=PREFILL_LENGTHS.keys())
@pytest.mark.parametrize("tiles_for", [prefill_tiles, short_prefill_tiles])
def test_prefill_lengths(
    lengths: list[tuple[int, int]], dtype: torch.dtype, tiles_for: Callable[..., PrefillTiles]
) -> None:
    tiles = tiles_for(128, dtype, gpu_class(torch.device("cuda")))
    check_prefill(lengths, head_dim=128, dtype=dtype, tiles=tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tiles_for", [prefill_tiles, short_prefill_tiles])
def test_prefill_head_dims(
    head_dim: int, dtype: torch.dtype, tiles_for: Callable[..., PrefillTiles]
) -> None:
    tiles = tiles_for(head_dim, dtype, gpu_class(torch.device("cuda")))
    lengths = [(0, 150), (200, 33), (40, 1)]
    check_prefill(lengths, head_dim=head_dim, dtype=dtype, tiles=tiles)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_prefill_group_sizes(group_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check_prefill([(0, 150), (200, 33), (40, 1)], group_size=group_size, dtype=dtype)


@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_prefill_block_sizes(block_size: int) -> None:
    lengths = [(0, block_size - 1), (block_size, block_size), (5, block_size + 1), (300, 300)]
    check_prefill(lengths, block_size=block_size, dtype=torch.bfloat16)


def test_chunks_give_what_the_whole_prompt_gives() -> None:
    batch = make_paged_batch([600], 2, 64, 16, torch.float32, "cuda")
    q = random_rows(600, 8, 64, torch.float32, "cuda")
    whole, chunked = poisoned(q), poisoned(q)
    run_prefill(whole, q, batch, 0, 600)
    for start, end in ((0, 250), (250, 251), (251, 600)):
        run_prefill(chunked[start:end], q[start:end], batch, start, end)
    assert (whole - chunked).abs().max().item() < 1e-5


def run_prefill(
    out: torch.Tensor, q: torch.Tensor, batch: PagedBatch, start: int, end: int
) -> None:
    cu_seqlens_q = torch.tensor([0, end - start], dtype=torch.int32, device="cuda")
    seq_lens = torch.tensor([end], dtype=torch.int32, device="cuda")
    paged_prefill_attention(
        out, q, batch.k_cache, batch.v_cache, batch.block_tables, cu_seqlens_q, seq_lens, 0.125,
    )  # fmt: skip


def test_decode_repeats_bit_for_bit_and_replays_in_a_graph() -> None:
    batch = make_paged_batch([300, 17, 900, 0], 2, 128, 16, torch.bfloat16, "cuda")
    q = random_rows(4, 8, 128, torch.bfloat16, "cuda")
    size = paged_decode_workspace_size(4, 8, 128, 4)
    workspace = torch.empty(size, device="cuda")
    seq_lens = batch.seq_lens.clone()

    def run(out: torch.Tensor) -> None:
        paged_decode_attention(
            out, q, batch.k_cache, batch.v_cache, batch.block_tables, seq_lens, 0.1,
            max_seq_len=1000, num_splits=4, workspace=workspace,
        )  # fmt: skip

    first, second, replayed = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(q)
    run(first)
    run(second)
    assert torch.equal(first, second)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    seq_lens.fill_(1)
    with torch.cuda.graph(graph):
        run(replayed)
    seq_lens.copy_(batch.seq_lens)
    workspace.fill_(float("nan"))
    graph.replay()
    assert torch.equal(first, replayed)


def test_decode_and_prefill_of_one_token_agree() -> None:
    batch = make_paged_batch([300, 17, 900], 2, 128, 16, torch.float32, "cuda")
    q = random_rows(3, 8, 128, torch.float32, "cuda")
    decoded, prefilled = poisoned(q), poisoned(q)
    args = (q, batch.k_cache, batch.v_cache, batch.block_tables)
    paged_decode_attention(decoded, *args, batch.seq_lens, 0.1, max_seq_len=900)
    starts = torch.arange(4, dtype=torch.int32, device="cuda")
    paged_prefill_attention(prefilled, *args, starts, batch.seq_lens, 0.1)
    assert (decoded - prefilled).abs().max().item() < 1e-5
