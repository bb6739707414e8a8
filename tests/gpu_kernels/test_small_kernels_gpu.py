"""The kernels around attention on a GPU: exact where they copy, against the oracle elsewhere."""

from collections.abc import Callable

import pytest
import torch

from gpu_kernels.handover import BELL_WORDS, FEW_PROGRAMS, MAX_PROGRAMS, receive_rows
from gpu_kernels.kv_swap import swap_in_kv, swap_out_kv
from gpu_kernels.warmup import ModelShape, count_compiled_variants, precompile
from tests.gpu_kernels.gpu import DTYPES, MARKS
from tests.gpu_kernels.kernel_checks import (
    check_embedding,
    check_greedy_tokens,
    check_handover,
    check_norm,
    check_norm_between_linears,
    check_rope_store,
    check_rotating_rows,
    check_silu,
    check_skinny_linear,
    check_store,
    check_swap,
)
from tests.gpu_kernels.serving_shapes import launch_serving_shapes

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_rope_store_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check_rope_store(70, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [32, 96, 128])
def test_rope_store_with_norm_and_partial_rotation(rotary_dim: int, dtype: torch.dtype) -> None:
    check_rope_store(33, head_dim=128, rotary_dim=rotary_dim, with_norm=True, dtype=dtype)
    check_rope_store(33, head_dim=128, rotary_dim=rotary_dim, dtype=dtype)


@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(1, 1), (3, 3), (8, 4), (2, 16), (32, 1)])
def test_rope_store_head_counts(num_kv_heads: int, group_size: int) -> None:
    check_rope_store(
        20, num_kv_heads=num_kv_heads, group_size=group_size, block_size=32, dtype=torch.bfloat16
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 80), (128, 128), (128, 64)])
def test_rotating_rows(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    for num_rows, with_norm, hidden_size in ((1, False, 576), (6, True, 4096), (70, False, 1500)):
        check_rotating_rows(
            num_rows, head_dim=head_dim, rotary_dim=rotary_dim, hidden_size=hidden_size,
            with_norm=with_norm, dtype=dtype,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_store(block_size: int, dtype: torch.dtype) -> None:
    for num_tokens, num_kv_heads, head_dim in ((1, 1, 64), (100, 3, 80), (70, 32, 128)):
        check_store(
            num_tokens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size,
            dtype=dtype,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 48, 64])
@pytest.mark.parametrize("pinned", [True, False])
def test_swap_out_and_in(pinned: bool, block_size: int, dtype: torch.dtype) -> None:
    for num_ids, num_kv_heads, head_dim in (
        (0, 2, 64), (1, 1, 64), (9, 3, 80), (5, 2, 96), (20, 8, 128), (3, 2, 256),
    ):  # fmt: skip
        check_swap(
            num_ids, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size,
            dtype=dtype, pinned=pinned, max_programs=1 if num_ids == 20 else 16,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_rows", "count"), [(1, 1), (5, 3), (64, 64), (200, 131), (9, 0)])
def test_handover(num_rows: int, count: int, dtype: torch.dtype) -> None:
    for width, max_programs in ((96, MAX_PROGRAMS), (6144, MAX_PROGRAMS), (6144, FEW_PROGRAMS)):
        check_handover(num_rows, count, width=width, dtype=dtype, max_programs=max_programs)


def test_a_wait_for_nobody_ends() -> None:
    answers = torch.ones(1, 4, 64, pin_memory=True)
    bells = torch.zeros(1, 2, BELL_WORDS, dtype=torch.int32, pin_memory=True)
    parameters = torch.tensor([1, 4, 0], dtype=torch.int32, device="cuda")
    seen, out = parameters.new_zeros(1), torch.zeros(4, 64, device="cuda")
    waited = torch.zeros(1, dtype=torch.int64, pin_memory=True)
    receive_rows(out, answers, bells, parameters, seen, waited, 0, limit_s=0.05)
    torch.cuda.synchronize()
    assert 0.05e9 <= waited.item() < 0.5e9


@pytest.mark.parametrize("swap", [swap_out_kv, swap_in_kv])
def test_swap_refuses_pageable_memory(swap: Callable[..., None]) -> None:
    pool = torch.zeros(1, 2, 1, 16, 64, device="cuda")
    ids = torch.arange(2, dtype=torch.int32, device="cuda")
    k_host = torch.zeros(1, 2, 1, 64, 16)
    with pytest.raises(ValueError, match="k_host: expected pinned"):
        swap(pool, pool.clone(), ids, k_host, pool.cpu(), ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(128, 128), (384, 1024), (4096, 14336), (6144, 4096)])
def test_linear_layers_of_a_few_rows(n: int, k: int, dtype: torch.dtype) -> None:
    for num_rows in (1, 15, 16, 17, 32):
        check_skinny_linear(num_rows, n, k, with_bias=num_rows % 2 == 1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("hidden_size", "k", "n"),
    [(128, 128, 128), (640, 256, 384), (4096, 14336, 6144), (5120, 1024, 256)],
)
def test_norms_between_linear_layers(hidden_size: int, k: int, n: int, dtype: torch.dtype) -> None:
    for num_rows in (1, 16, 17, 32):
        sizes = (num_rows, hidden_size, k, n)
        check_norm_between_linears(*sizes, with_bias=num_rows == 17, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [8, 576, 4096, 5120, 16384])
def test_norms(hidden_size: int, dtype: torch.dtype) -> None:
    for num_rows in (1, 33):
        check_norm(num_rows, hidden_size, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [8, 576, 4096, 5120])
def test_embedding(hidden_size: int, dtype: torch.dtype) -> None:
    for num_rows in (1, 33):
        check_embedding(num_rows, hidden_size, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [3, 8192, 49152, 128256])
def test_greedy_tokens(vocab_size: int, dtype: torch.dtype) -> None:
    for num_rows in (1, 33):
        check_greedy_tokens(num_rows, vocab_size, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("intermediate_size", [8, 1536, 11008])
def test_silu(intermediate_size: int, dtype: torch.dtype) -> None:
    for num_rows in (1, 33):
        check_silu(num_rows, intermediate_size, dtype=dtype)


@pytest.mark.parametrize("has_qk_norm", [False, True])
def test_after_precompile_serving_compiles_nothing(has_qk_norm: bool) -> None:
    shape = ModelShape(
        num_q_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536,
        vocab_size=49152,
        block_size=16, dtype=torch.float16, has_qk_norm=has_qk_norm,
    )  # fmt: skip
    assert precompile(shape, torch.device("cuda"))
    before = count_compiled_variants()
    launch_serving_shapes(shape, "cuda")
    torch.cuda.synchronize()
    assert count_compiled_variants() == before
