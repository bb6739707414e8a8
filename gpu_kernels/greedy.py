"""The last kernel of a step: each row's likeliest token, for the next step and for the host.

Rows are cut into chunks so that a few of them fill the GPU; the program that finishes a row last
picks the best of its chunks. Tokens go to pinned memory, too: a copy by itself would stand between
this step and the next one.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import check_contiguous, check_dense_rows, check_float, check_tensor, wrong
from gpu_kernels.pdl import begin, pdl_options
from gpu_kernels.tiles import cdiv, next_power_of_2

TILE_N = 8192


@triton.jit(
    do_not_specialize=["token_ids_ptr", "host_ptr", "slot_ptr", "counter_ptr", "stride_host"]
)
def greedy_tokens_kernel(
    token_ids_ptr,
    host_ptr,
    slot_ptr,
    logits_ptr,
    best_ptr,
    best_id_ptr,
    counter_ptr,
    stride_host,
    stride_logits,
    VOCAB_SIZE: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    TILE_N: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Finds the largest of one row's chunk; the row's last program, that of all of it.

    Grid (NUM_CHUNKS, num_rows). Of equal ones, the first counts; NaN counts as infinite.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    begin(USE_PDL)
    offs_n = chunk * TILE_N + tl.arange(0, TILE_N)
    inside = offs_n < VOCAB_SIZE
    logits_ptrs = logits_ptr + row * stride_logits + offs_n
    logits = tl.load(logits_ptrs, mask=inside, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits != logits, float("inf"), logits)
    best = tl.max(logits, 0)
    first = row * NUM_CHUNKS
    tl.store(best_ptr + first + chunk, best)
    tl.store(best_id_ptr + first + chunk, tl.min(tl.where(logits == best, offs_n, VOCAB_SIZE), 0))
    tl.debug_barrier()
    num_done = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel")
    if num_done == NUM_CHUNKS - 1:
        tl.store(counter_ptr + row, 0)
        offs_c = tl.arange(0, TILE_CHUNKS)
        mask = offs_c < NUM_CHUNKS
        chunk_ptrs = first + offs_c
        bests = tl.load(best_ptr + chunk_ptrs, mask=mask, other=float("-inf"), cache_modifier=".cg")
        ids = tl.load(best_id_ptr + chunk_ptrs, mask=mask, other=VOCAB_SIZE, cache_modifier=".cg")
        token = tl.min(tl.where(bests == tl.max(bests, 0), ids, VOCAB_SIZE), 0).to(tl.int64)
        tl.store(token_ids_ptr + row, token)
        tl.store(host_ptr + tl.load(slot_ptr) * stride_host + row, token)


def greedy_tokens(
    token_ids: torch.Tensor,
    host_token_ids: torch.Tensor,
    slot: torch.Tensor,
    logits: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Finds the first of the largest elements of each row.

    Args:
        token_ids: [num_rows], int64, contiguous; overwritten.
        host_token_ids: [num_slots, any], int64, rows of at least num_rows elements, in pinned
            memory (or on the device); the first num_rows elements of one slot are overwritten.
        slot: [1], int64, on the device; which one.
        logits: [num_rows, vocab_size], bfloat16, float16 or float32, rows may be strided.
        counters: At least num_rows elements, int32, all zero before and after. Calls that may
            overlap need counters of their own.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    check_float("logits", logits, 2)
    check_dense_rows("logits", logits)
    num_rows, vocab_size = logits.shape
    device = logits.device
    check_tensor("token_ids", token_ids, (num_rows,), torch.int64, device)
    check_contiguous("token_ids", token_ids)
    check_tensor("host_token_ids", host_token_ids, (None, None), torch.int64, host_token_ids.device)
    check_dense_rows("host_token_ids", host_token_ids)
    if host_token_ids.shape[1] < num_rows:
        raise wrong("host_token_ids", f"rows of {num_rows} elements", list(host_token_ids.shape))
    if host_token_ids.device != device and not host_token_ids.is_pinned():
        raise wrong("host_token_ids", "pinned memory", "pageable memory")
    check_tensor("slot", slot, (1,), torch.int64, device)
    check_tensor("counters", counters, (None,), torch.int32, device)
    check_contiguous("counters", counters)
    if len(counters) < num_rows:
        raise wrong("counters", f"{num_rows} elements", len(counters))
    if num_rows == 0:
        return
    num_chunks = cdiv(vocab_size, TILE_N)
    best = torch.empty(num_rows * num_chunks, dtype=torch.float32, device=device)
    greedy_tokens_kernel[(num_chunks, num_rows)](
        token_ids, host_token_ids, slot, logits, best, torch.empty_like(best, dtype=torch.int32),
        counters, host_token_ids.stride(0), logits.stride(0),
        VOCAB_SIZE=vocab_size, NUM_CHUNKS=num_chunks, TILE_CHUNKS=next_power_of_2(num_chunks),
        TILE_N=TILE_N, num_warps=8, **pdl_options(device),
    )  # fmt: skip
