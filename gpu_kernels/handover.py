"""Rows to the host and answers back, without anybody else in between.

The GPU writes rows straight into pinned memory and rings a bell there, a 32-bit word; later it
waits until the host's bell has reached a ticket and copies the answer. What changes from step to
step lies in device memory (`PARAMETERS` a channel), so that a captured graph can be used again.

A wait ends after a limit at the latest: whoever never gets an answer reads what was there before.
"""

# Kernel bodies are Triton's language, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from gpu_kernels.checks import (
    check_contiguous,
    check_dense_rows,
    check_float,
    check_tensor,
    wrong,
)
from gpu_kernels.tiles import next_power_of_2

PARAMETERS = 3
"""A channel's parameters, int32: the first ticket, how many rows, and which slot of the buffers."""
BELL_WORDS = 16
MAX_PROGRAMS = 64
FEW_PROGRAMS = 4
"""Beside other kernels, which have the multiprocessors to themselves but for these."""
_TILE = 4096


@triton.jit
def load_system(ptr, ON_GPU: tl.constexpr):
    """Reads a 32-bit word that the host writes; nothing that follows is read before it."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.u32 $0, [$1];", "=r,l", [ptr],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return tl.load(ptr)


@triton.jit
def store_system(ptr, value, ON_GPU: tl.constexpr):
    """Writes a 32-bit word that the host reads, behind all that was written before."""
    if ON_GPU:
        tl.inline_asm_elementwise(
            "st.release.sys.global.u32 [$1], $2; mov.u32 $0, 0;", "=r,l,r", [ptr, value],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(ptr, value)


@triton.jit
def now_ns(ON_GPU: tl.constexpr):
    """Returns the GPU's clock in nanoseconds."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    return tl.full([], 0, tl.int64)


@triton.jit
def wait_for(ptr, ticket, limit_ns, ON_GPU: tl.constexpr):
    """Waits until a word has reached a ticket, as far as 32 bits tell; returns how long, ns."""
    start = now_ns(ON_GPU)
    waited = start - start
    while (load_system(ptr, ON_GPU) - ticket < 0) & (waited < limit_ns):
        waited = now_ns(ON_GPU) - start
    return waited


@triton.jit
def copy_row(
    dst_ptr, src_ptr, row, stride_dst, stride_src,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    FROM_HOST: tl.constexpr,
):  # fmt: skip
    """Copies a row; what the host wrote is read anew, whatever a cache may hold."""
    for start in range(0, WIDTH, TILE):
        offs = start + tl.arange(0, TILE)
        mask = offs < WIDTH
        values = tl.load(src_ptr + row * stride_src + offs, mask=mask, volatile=FROM_HOST)
        tl.store(dst_ptr + row * stride_dst + offs, values, mask=mask)


@triton.jit(do_not_specialize=["offset", "parameters_ptr", "counter_ptr"])
def send_rows_kernel(
    rows_ptr,
    src_ptr,
    bells_ptr,
    parameters_ptr,
    counter_ptr,
    offset,
    stride_slot: tl.int64,
    stride_row: tl.int64,
    stride_src: tl.int64,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """Copies rows to a slot of pinned memory, then rings its request bell.

    Grid (programs,). The programs share the rows; the last one to be done rings for all.
    """
    ticket = tl.load(parameters_ptr) + offset
    count = tl.load(parameters_ptr + 1)
    slot = tl.load(parameters_ptr + 2).to(tl.int64)
    if count == 0:
        return
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        dst_ptr = rows_ptr + slot * stride_slot
        copy_row(dst_ptr, src_ptr, row, stride_row, stride_src, WIDTH, TILE, False)
    tl.debug_barrier()
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="sys")
    if done == tl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)
        store_system(bells_ptr + slot * (2 * WORDS), ticket, ON_GPU)


@triton.jit(do_not_specialize=["offset", "parameters_ptr", "seen_ptr", "waited_ptr"])
def receive_rows_kernel(
    dst_ptr,
    answers_ptr,
    bells_ptr,
    parameters_ptr,
    seen_ptr,
    waited_ptr,
    offset,
    limit_ns: tl.int64,
    stride_slot: tl.int64,
    stride_row: tl.int64,
    stride_dst: tl.int64,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """Waits for a slot's answer bell, then copies the answers from pinned memory.

    Grid (programs,). The first program watches the host's word and passes it on to the others,
    who watch a word on the device instead: one reader over PCIe is enough.
    """
    ticket = tl.load(parameters_ptr) + offset
    count = tl.load(parameters_ptr + 1)
    slot = tl.load(parameters_ptr + 2).to(tl.int64)
    if count == 0:
        return
    # Each slot has tickets of its own, so what was seen of another's says nothing.
    if tl.program_id(0) == 0:
        waited = wait_for(bells_ptr + slot * (2 * WORDS) + WORDS, ticket, limit_ns, ON_GPU)
        store_system(seen_ptr + slot, ticket, ON_GPU)
        tl.store(waited_ptr, tl.load(waited_ptr) + waited)
    else:
        wait_for(seen_ptr + slot, ticket, limit_ns, ON_GPU)
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        src_ptr = answers_ptr + slot * stride_slot
        copy_row(dst_ptr, src_ptr, row, stride_dst, stride_row, WIDTH, TILE, True)


def on_gpu(device: torch.device) -> bool:
    """Whether a device knows the instructions that a host is spoken to with."""
    return device.type == "cuda"


def send_rows(
    rows: torch.Tensor,
    src: torch.Tensor,
    bells: torch.Tensor,
    parameters: torch.Tensor,
    counter: torch.Tensor,
    offset: int,
    *,
    max_programs: int = MAX_PROGRAMS,
) -> None:
    """Copies rows to pinned memory and rings; nothing happens if the parameters say 0 rows.

    Args:
        rows: [num_slots, max_rows, width], pinned (or on the device); one slot is overwritten.
        src: [n, width], rows' dtype, device, rows may be strided; n at least the parameters' rows.
        bells: [num_slots, 2, BELL_WORDS], int32, pinned like rows; word [slot, 0, 0] is rung.
        parameters: [PARAMETERS], int32, device: first ticket, rows, slot.
        counter: [1], int32, device, 0 before and after.
        offset: Added to the ticket.
        max_programs: Most programs that copy.

    Raises:
        ValueError: An argument's shape, dtype, stride or device is wrong.
    """
    pinned = {"rows": rows, "bells": bells}
    width = _check(pinned, {"src": src, "parameters": parameters})
    check_tensor("counter", counter, (1,), torch.int32, src.device)
    num_programs = min(max_programs, src.shape[0])
    if num_programs == 0:
        return
    send_rows_kernel[(num_programs,)](
        rows, src, bells, parameters, counter, offset,
        rows.stride(0), rows.stride(1), src.stride(0),
        WIDTH=width, TILE=min(_TILE, next_power_of_2(width)), WORDS=BELL_WORDS,
        ON_GPU=on_gpu(src.device), num_warps=8,
    )  # fmt: skip


def receive_rows(
    dst: torch.Tensor,
    answers: torch.Tensor,
    bells: torch.Tensor,
    parameters: torch.Tensor,
    seen: torch.Tensor,
    waited: torch.Tensor,
    offset: int,
    *,
    limit_s: float,
    max_programs: int = MAX_PROGRAMS,
) -> None:
    """Waits for the host and copies its answers; nothing happens if the parameters say 0 rows.

    Args:
        dst: [n, width], answers' dtype, device, rows may be strided; as many as the parameters say
            are overwritten, at most n.
        answers: [num_slots, max_rows, width], pinned (or on the device).
        bells: As in `send_rows`; word [slot, 1, 0] is waited for.
        parameters: As there.
        seen: [num_slots], int32, device; the newest ticket that came to each.
        waited: [1], int64, pinned (or on the device); grows by the nanoseconds waited.
        offset: Added to the ticket.
        limit_s: The longest wait, seconds.
        max_programs: As there.

    Raises:
        ValueError: As there.
    """
    pinned = {"answers": answers, "bells": bells, "waited": waited}
    width = _check(pinned, {"dst": dst, "parameters": parameters})
    check_tensor("seen", seen, (bells.shape[0],), torch.int32, dst.device)
    check_contiguous("seen", seen)
    check_tensor("waited", waited, (1,), torch.int64, waited.device)
    num_programs = min(max_programs, dst.shape[0])
    if num_programs == 0:
        return
    receive_rows_kernel[(num_programs,)](
        dst, answers, bells, parameters, seen, waited, offset, int(limit_s * 1e9),
        answers.stride(0), answers.stride(1), dst.stride(0),
        WIDTH=width, TILE=min(_TILE, next_power_of_2(width)), WORDS=BELL_WORDS,
        ON_GPU=on_gpu(dst.device), num_warps=8,
    )  # fmt: skip


def _check(pinned: dict[str, torch.Tensor], on_device: dict[str, torch.Tensor]) -> int:
    """Checks either launcher's arguments, in their order, and returns the width of a row."""
    (buffer_name, buffer), (bells_name, bells), *_ = pinned.items()
    (rows_name, rows), (parameters_name, parameters) = on_device.items()
    check_float(rows_name, rows, 2)
    check_dense_rows(rows_name, rows)
    width, device = rows.shape[1], rows.device
    check_tensor(buffer_name, buffer, (None, None, width), rows.dtype, buffer.device)
    check_contiguous(buffer_name, buffer)
    check_tensor(bells_name, bells, (buffer.shape[0], 2, BELL_WORDS), torch.int32, bells.device)
    check_contiguous(bells_name, bells)
    check_tensor(parameters_name, parameters, (PARAMETERS,), torch.int32, device)
    check_contiguous(parameters_name, parameters)
    for name, tensor in pinned.items():
        if tensor.device != device and not tensor.is_pinned():
            expected = f"pinned host memory or a tensor on {device}"
            raise wrong(name, expected, f"pageable memory on {tensor.device}")
    return width
