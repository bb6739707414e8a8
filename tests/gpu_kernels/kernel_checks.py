"""One check a kernel: run it on given shapes and compare with the oracle. Shared by all runners.

The GPU tests call these with the house-style cases, the interpreter and the sanitizer with tiny
ones, so that each comparison is written once.
"""

import itertools
import time

import torch

from gpu_kernels.activation import silu_and_mul
from gpu_kernels.decode_attention import paged_decode_attention
from gpu_kernels.embedding import embed_rows
from gpu_kernels.few_rows import (
    NUM_COUNTERS,
    skinny_gated_linear,
    skinny_linear,
    skinny_linear_add_norm,
)
from gpu_kernels.greedy import TILE_N, greedy_tokens
from gpu_kernels.handover import BELL_WORDS, MAX_PROGRAMS, receive_rows, send_rows
from gpu_kernels.kv_store import store_kv
from gpu_kernels.kv_swap import NUM_PROGRAMS, swap_in_kv, swap_out_kv
from gpu_kernels.norm import add_rms_norm, rms_norm
from gpu_kernels.pcie_attention import ENTRY_FIELDS, host_pool_attention
from gpu_kernels.prefill_attention import paged_prefill_attention
from gpu_kernels.rope_store import rope_store_kv
from gpu_kernels.rotating_rows import depart_rows, rejoin_rows
from gpu_kernels.tiles import PrefillTiles
from tests.gpu_kernels import oracle
from tests.gpu_kernels.inputs import cos_sin_cache, make_paged_batch, random_rows


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """A NaN-filled output with the (possibly strided) layout of `like`'s rows."""
    rows, heads, head_dim = like.shape
    wide = torch.full((rows, (heads + 1) * head_dim), float("nan"), dtype=like.dtype)
    return wide.to(like.device)[:, : heads * head_dim].view(rows, heads, head_dim)


def check_decode(
    seq_lens: list[int],
    *,
    num_kv_heads: int = 2,
    group_size: int = 4,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    num_splits: int | None = None,
) -> None:
    """Checks splits merged by a second kernel and by their last program, which is run twice."""
    batch = make_paged_batch(seq_lens, num_kv_heads, head_dim, block_size, dtype, device)
    q = random_rows(len(seq_lens), num_kv_heads * group_size, head_dim, dtype, device)
    counters = torch.zeros(len(seq_lens) * num_kv_heads, dtype=torch.int32, device=device)
    scale = head_dim**-0.5
    outs = []
    for given in (None, counters, counters):
        out = poisoned(q)
        paged_decode_attention(
            out, q, batch.k_cache, batch.v_cache, batch.block_tables, batch.seq_lens, scale,
            max_seq_len=max([*seq_lens, 1]), num_splits=num_splits, counters=given,
        )  # fmt: skip
        outs.append(out)
    assert not counters.any()
    exact, plain = torch.zeros_like(out, dtype=torch.float32), torch.zeros_like(out)
    for row, seq_len in enumerate(seq_lens):
        if seq_len > 0:
            args = (q[row : row + 1], batch.k_seqs[row], batch.v_seqs[row], scale)
            exact[row] = oracle.attention(*args, torch.float32)[0]
            plain[row] = oracle.attention(*args, dtype)[0]
    used = batch.seq_lens > 0
    for out in outs:
        assert torch.isnan(out[~used]).all(), "padding rows were written"
        oracle.assert_close(out[used], exact[used], plain[used])
    assert torch.equal(outs[1][used], outs[2][used])


def check_prefill(
    lengths: list[tuple[int, int]],
    *,
    num_kv_heads: int = 2,
    group_size: int = 4,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    tiles: PrefillTiles | None = None,
) -> None:
    """`lengths` are (cached prefix, new tokens) of each sequence."""
    seq_lens = [prefix + new for prefix, new in lengths]
    batch = make_paged_batch(seq_lens, num_kv_heads, head_dim, block_size, dtype, device)
    starts = [0]
    for _, new in lengths:
        starts.append(starts[-1] + new)
    padding = 3
    num_q_heads = num_kv_heads * group_size
    q = random_rows(starts[-1] + padding, num_q_heads, head_dim, dtype, device)
    out = poisoned(q)
    scale = head_dim**-0.5
    paged_prefill_attention(
        out, q, batch.k_cache, batch.v_cache, batch.block_tables,
        torch.tensor(starts, dtype=torch.int32, device=device), batch.seq_lens, scale,
        tiles=tiles,
    )  # fmt: skip
    assert torch.isnan(out[starts[-1] :]).all(), "padding rows were written"
    exact, plain = torch.zeros_like(out, dtype=torch.float32), torch.zeros_like(out)
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        if start < end:
            args = (q[start:end], batch.k_seqs[row], batch.v_seqs[row], scale)
            exact[start:end] = oracle.attention(*args, torch.float32)
            plain[start:end] = oracle.attention(*args, dtype)
    rows = slice(0, starts[-1])
    oracle.assert_close(out[rows], exact[rows], plain[rows])


def rotated(
    x: torch.Tensor, norm: torch.Tensor | None, positions: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalises heads if there are weights and rotates them, in float32 and in their dtype."""
    wide = x.float() if norm is None else oracle.rms_norm(x.float(), norm.float(), 1e-6)
    half = x if norm is None else oracle.rms_norm(x, norm, 1e-6)
    plain = oracle.rope(half, positions, table.to(x.dtype))
    return oracle.rope(wide, positions, table), plain


def check_rope_store(
    num_tokens: int,
    *,
    num_kv_heads: int = 2,
    group_size: int = 4,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    block_size: int = 16,
    with_norm: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> None:
    """Rotates num_tokens rows; every third row has no slot."""
    generator = torch.Generator().manual_seed(5)
    num_q_heads = num_kv_heads * group_size
    table = cos_sin_cache(512, rotary_dim or head_dim, device)
    q = random_rows(num_tokens, num_q_heads, head_dim, dtype, device, seed=1)
    k = random_rows(num_tokens, num_kv_heads, head_dim, dtype, device, seed=2)
    v = random_rows(num_tokens, num_kv_heads, head_dim, dtype, device, seed=3)
    positions = torch.randint(0, 512, (num_tokens,), generator=generator).to(device)
    num_blocks = num_tokens // block_size + 2
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    slots[::3] = -1
    slots = slots.to(device)
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    k_cache = torch.randn(shape, generator=generator).to(dtype).to(device)
    v_cache = torch.randn(shape, generator=generator).to(dtype).to(device)
    expected_v_cache, old_k_cache = v_cache.clone(), k_cache.clone()
    weights = (1 + 0.3 * torch.randn(2, head_dim, generator=generator)).to(dtype).to(device)
    norms = weights if with_norm else [None, None]
    expected_q, expected_k = (
        rotated(x, norm, positions, table) for x, norm in zip((q, k), norms, strict=True)
    )
    v_before = v.clone()
    rope_store_kv(
        q, k, v, positions, table, k_cache, v_cache, slots,
        q_norm_weight=norms[0], k_norm_weight=norms[1],
    )  # fmt: skip
    oracle.assert_close(q, *expected_q)
    oracle.assert_close(k, *expected_k)
    assert torch.equal(v, v_before)
    expected_k_cache = old_k_cache
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected_k_cache[slot // block_size, :, slot % block_size] = k[token]
            expected_v_cache[slot // block_size, :, slot % block_size] = v[token]
    assert torch.equal(k_cache, expected_k_cache)
    assert torch.equal(v_cache, expected_v_cache)


def check_rotating_rows(
    num_rows: int,
    *,
    num_kv_heads: int = 2,
    group_size: int = 4,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    hidden_size: int = 576,
    with_norm: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> None:
    """Lets rows depart and others rejoin; what nobody asked to be written stays NaN."""
    generator = torch.Generator().manual_seed(8)
    num_q_heads, num_slots = num_kv_heads * group_size, num_rows + 4
    table = cos_sin_cache(512, rotary_dim or head_dim, device)
    heads = [num_q_heads, num_kv_heads, num_kv_heads]
    qkv = random_rows(num_rows, sum(heads), head_dim, dtype, device, seed=1)
    q, k, v = qkv.split(heads, dim=1)
    residual = random_rows(num_rows, 1, hidden_size, dtype, device, seed=2)[:, 0]
    positions = torch.randint(0, 512, (num_rows,), generator=generator).to(device)
    slots = torch.randperm(num_slots, generator=generator)[:num_rows].to(device)
    weights = (1 + 0.3 * torch.randn(2, head_dim, generator=generator)).to(dtype).to(device)
    sent = poisoned(qkv)
    kept = poisoned(residual[:1, None].expand(num_slots, 1, hidden_size))[:, 0]
    qkv_before, norms = qkv.clone(), weights if with_norm else [None, None]
    depart_rows(
        sent.flatten(1), kept, qkv.flatten(1), residual, positions, slots, table,
        num_q_heads=num_q_heads, num_kv_heads=num_kv_heads,
        q_norm_weight=norms[0], k_norm_weight=norms[1],
    )  # fmt: skip
    sent_q, sent_k, sent_v = sent.split(heads, dim=1)
    for got, x, norm in zip((sent_q, sent_k), (q, k), norms, strict=True):
        oracle.assert_close(got, *rotated(x, norm, positions, table))
    assert torch.equal(sent_v, v)
    assert torch.equal(qkv, qkv_before)
    expected_kept = torch.full_like(kept, float("nan"))
    expected_kept[slots] = residual
    oracle.assert_same_bits(kept, expected_kept)

    answers = random_rows(num_rows + 3, num_q_heads, head_dim, dtype, device, seed=4)
    answer_ids = torch.randint(0, num_rows + 3, (num_rows,), generator=generator).to(device)
    out, back = poisoned(q), poisoned(residual[:, None])[:, 0]
    rejoin_rows(out.flatten(1), back, answers.flatten(1), answer_ids, kept, slots)
    assert torch.equal(out, answers[answer_ids])
    assert torch.equal(back, residual)


def check_store(
    num_tokens: int,
    *,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> None:
    generator = torch.Generator().manual_seed(6)
    k = random_rows(num_tokens, num_kv_heads, head_dim, dtype, device, seed=2)
    v = random_rows(num_tokens, num_kv_heads, head_dim, dtype, device, seed=3)
    num_blocks = num_tokens // block_size + 2
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    slots[1::3] = -1
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    k_cache = torch.full(shape, 7.0, dtype=dtype, device=device)
    v_cache = torch.full(shape, 8.0, dtype=dtype, device=device)
    expected = k_cache.clone(), v_cache.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for cache, rows in zip(expected, (k, v), strict=True):
                cache[slot // block_size, :, slot % block_size] = rows[token]
    store_kv(k, v, k_cache, v_cache, slots.to(device))
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])


def nan_pool(
    num_blocks: int, shape: tuple[int, ...], dtype: torch.dtype, device: str, *, pinned: bool
) -> torch.Tensor:
    """Three layers of NaN, [3, num_blocks, *shape], further apart than they are long."""
    where = {"pin_memory": True} if pinned else {"device": device}
    return torch.full((3, num_blocks + 1, *shape), float("nan"), dtype=dtype, **where)[:, :-1]


def check_handover(
    num_rows: int,
    count: int,
    *,
    width: int = 96,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    max_programs: int = MAX_PROGRAMS,
) -> None:
    """Sends rows to slot 1 of 3 and takes answers from there; the host's memory is pinned."""
    generator = torch.Generator().manual_seed(5)
    ticket, offset, limit_s = 2**31 - 3, 4, 5.0  # wraps around

    def host(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=device == "cuda")

    def word(value: int) -> int:
        return (value + 2**31) % 2**32 - 2**31

    def words(*values: int) -> torch.Tensor:
        return torch.tensor([word(v) for v in values], dtype=torch.int32, device=device)

    rows, answers = host(3, num_rows + 2, width), host(3, num_rows + 2, width)
    bells, waited = host(3, 2, BELL_WORDS, dtype=torch.int32), host(1, dtype=torch.int64)
    src = torch.randn(num_rows, width + 8, generator=generator).to(dtype).to(device)[:, :width]
    parameters, counter = words(ticket, count, 1), words(0)
    send_rows(rows, src, bells, parameters, counter, offset, max_programs=max_programs)
    if device == "cuda":
        torch.cuda.synchronize()
    expected = torch.zeros_like(rows)
    expected[1, :count] = src[:count].cpu()
    oracle.assert_same_bits(rows, expected)
    rung = torch.zeros_like(bells)
    rung[1, 0, 0] = word(ticket + offset) if count else 0
    assert torch.equal(bells, rung)
    assert counter.item() == 0

    answers.copy_(torch.randn(answers.shape, generator=generator))
    dst = torch.full((num_rows, width + 8), torch.nan, dtype=dtype, device=device)[:, :width]
    receive = (dst, answers, bells, parameters, words(0, ticket, ticket + 99), waited, offset)
    if device == "cpu":
        bells[1, 1, 0] = word(ticket + offset)
        receive_rows(*receive, limit_s=limit_s, max_programs=max_programs)
    else:
        bells[1, 1, 0] = word(ticket)
        # Waits for what comes next.
        receive_rows(*receive, limit_s=limit_s, max_programs=max_programs)
        time.sleep(0.02)
        bells[1, 1, 0] = word(ticket + offset + 1)  # a later ticket counts, too
        torch.cuda.synchronize()
        assert 0.01 < waited.item() / 1e9 < limit_s or not count
    got = dst.cpu()
    oracle.assert_same_bits(got[:count], answers[1, :count])
    assert got[count:].isnan().all()


def check_swap(
    num_ids: int,
    *,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    pinned: bool = False,
    max_programs: int = NUM_PROGRAMS,
) -> None:
    """Swaps shuffled blocks out and in elsewhere; the host pool is pinned or on the device."""
    generator = torch.Generator().manual_seed(7)
    num_blocks, num_host_blocks = num_ids + 3, num_ids + 5
    shape = (num_kv_heads, block_size, head_dim)
    k_shape = (num_kv_heads, head_dim, block_size)

    def shuffled(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=generator, dtype=torch.int32)[:num_ids].to(device)

    ids, host_ids, new_ids = shuffled(num_blocks), shuffled(num_host_blocks), shuffled(num_blocks)
    old, new = (
        [nan_pool(num_blocks, shape, dtype, device, pinned=False) for _ in range(2)]
        for _ in range(2)
    )
    host = [nan_pool(num_host_blocks, s, dtype, device, pinned=pinned) for s in (k_shape, shape)]
    for pool in old:
        values = torch.randn((3, num_ids, *shape), generator=generator)
        pool[:, ids.long()] = values.to(dtype).to(device)
    expected_old = [pool.clone() for pool in old]
    expected_host = [pool.clone() for pool in host]
    oracle.swap_out(*old, ids.tolist(), *expected_host, host_ids.tolist())
    expected_new = [pool.clone() for pool in new]
    for pool, source in zip(expected_new, old, strict=True):
        pool[:, new_ids.long()] = source[:, ids.long()]
    none = ids.new_full((2,), -1)
    padded = torch.cat([host_ids, none])
    swap_out_kv(*old, torch.cat([ids, none]), *host, padded, max_programs=max_programs)
    swap_in_kv(*new, torch.cat([new_ids, none]), *host, padded, max_programs=max_programs)
    if device == "cuda":
        torch.cuda.synchronize()
    for got, expected in zip(
        (*old, *host, *new), (*expected_old, *expected_host, *expected_new), strict=True
    ):
        oracle.assert_same_bits(got, expected)


def check_host_pool_attention(
    seq_lens: list[int],
    *,
    num_kv_heads: int = 2,
    group_size: int = 4,
    head_dim: int = 64,
    block_size: int = 16,
    num_programs: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    pinned: bool = False,
) -> None:
    """Attends from shuffled rows; the host pool is NaN where no past token is."""
    num_q_heads, num_entries = num_kv_heads * group_size, len(seq_lens)
    heads = [num_q_heads, num_kv_heads, num_kv_heads]
    generator = torch.Generator().manual_seed(9)
    past_lens = [max(0, length - 1) for length in seq_lens]
    past = make_paged_batch(past_lens, num_kv_heads, head_dim, block_size, dtype, device)
    k_host, v_host = past.k_cache.transpose(2, 3).contiguous(), past.v_cache
    if pinned:
        k_host, v_host = k_host.cpu().pin_memory(), v_host.cpu().pin_memory()
    sent = random_rows(num_entries + 2, sum(heads), head_dim, dtype, device, seed=4)
    rows = torch.randperm(num_entries + 2, generator=generator)[:num_entries]
    outs = torch.randperm(num_entries + 3, generator=generator)[:num_entries]
    lists = [
        [*table[: -(-length // block_size)].tolist(), 2**30]
        for table, length in zip(past.block_tables.cpu(), past_lens, strict=True)
    ]
    firsts = list(itertools.accumulate(map(len, lists), initial=0))[:-1]
    fields = [rows.tolist(), outs.tolist(), seq_lens, firsts]
    entries = torch.tensor(fields, dtype=torch.int32, device=device).view(ENTRY_FIELDS, num_entries)
    blocks = torch.tensor([b for one in lists for b in one], dtype=torch.int32, device=device)
    out = poisoned(random_rows(num_entries + 3, num_q_heads, head_dim, dtype, device))
    scale = head_dim**-0.5
    host_pool_attention(
        out.flatten(1), sent.flatten(1), entries, blocks, k_host, v_host, scale,
        num_programs=num_programs,
    )  # fmt: skip
    written = [outs[i] for i, length in enumerate(seq_lens) if length]
    assert out[[i for i in range(num_entries + 3) if i not in written]].isnan().all()
    for i, length in enumerate(seq_lens):
        if not length:
            continue
        q, k, v = sent[rows[i]][None].split(heads, dim=1)
        keys, values = torch.cat([past.k_seqs[i], k]), torch.cat([past.v_seqs[i], v])
        exact = oracle.attention(q, keys, values, scale, torch.float32)
        plain = oracle.attention(q, keys, values, scale, dtype)
        oracle.assert_close(out[outs[i]][None], exact, plain)


def check_norm(
    num_rows: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> None:
    """Checks both norms; rows are strided views, the output of the second is its input."""
    x = random_rows(num_rows, 1, hidden_size, dtype, device, seed=1)[:, 0]
    residual = random_rows(num_rows, 1, hidden_size, dtype, device, seed=2)[:, 0]
    weight = 1 + 0.3 * random_rows(1, 1, hidden_size, dtype, device, seed=3)[0, 0]
    out = torch.full((num_rows, hidden_size), float("nan"), dtype=dtype, device=device)
    rms_norm(out, x, weight, 1e-5)
    wide_weight = weight.float()
    exact = oracle.rms_norm(x.float(), wide_weight, 1e-5)
    oracle.assert_close(out, exact, oracle.rms_norm(x, weight, 1e-5))

    total = residual + x
    exact = oracle.rms_norm(total.float(), wide_weight, 1e-5)
    plain = oracle.rms_norm(total, weight, 1e-5)
    add_rms_norm(x, x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    oracle.assert_close(x, exact, plain)


def check_silu(
    num_rows: int,
    intermediate_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> None:
    gate_up = random_rows(num_rows, 2, intermediate_size, dtype, device).flatten(1) / 2
    gate_up[:, 0] = -200.0
    out = torch.full((num_rows, intermediate_size), float("nan"), dtype=dtype, device=device)
    silu_and_mul(out, gate_up)
    oracle.assert_close(out, oracle.silu_and_mul(gate_up.float()), oracle.silu_and_mul(gate_up))


def check_skinny_linear(
    num_rows: int,
    n: int,
    k: int,
    *,
    with_bias: bool = False,
    dtype: torch.dtype = torch.float16,
    device: str = "cuda",
) -> None:
    """Checks both kernels, twice: the second run finds the counters as the first left them."""
    # What plain torch loses is taken over 64 rows: over a single one it is luck.
    all_x = random_rows(64, 1, k, dtype, device, seed=1)[:, 0]
    x = all_x[:num_rows]
    weight = random_rows(n, 1, k, dtype, device, seed=2)[:, 0].contiguous() / k**0.5
    bias = random_rows(1, 1, n, dtype, device, seed=3)[0, 0].contiguous() if with_bias else None
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    exact = oracle.linear(all_x.float(), weight, bias)
    plain = oracle.linear(all_x, weight, bias)
    outs = []
    for _ in range(2):
        out = poisoned(x[:, None, :1].expand(-1, 1, n))[:, 0]
        skinny_linear(out, x, weight, bias, counters)
        oracle.assert_close(out, exact, plain)
        assert not counters.any()
        outs.append(out)
    assert torch.equal(*outs)
    gated = poisoned(x[:, None, :1].expand(-1, 1, n // 2))[:, 0]
    skinny_gated_linear(gated, x, weight, bias)
    exact, plain = oracle.silu_and_mul(exact), oracle.silu_and_mul(plain)
    oracle.assert_close(gated, exact, plain)


def check_norm_between_linears(
    num_rows: int,
    hidden_size: int,
    k: int,
    n: int,
    *,
    with_bias: bool = False,
    dtype: torch.dtype = torch.float16,
    device: str = "cuda",
) -> None:
    """Checks a layer that adds to the residual and both that read what it leaves, run twice."""
    eps = 1e-2  # as large as a mean square, so that leaving it out shows
    all_x = random_rows(64, 1, k, dtype, device, seed=1)[:, 0]
    all_residual = random_rows(64, 1, hidden_size, dtype, device, seed=2)[:, 0] / 8
    weight = random_rows(hidden_size, 1, k, dtype, device, seed=3)[:, 0].contiguous() / 8 / k**0.5
    norm_weight = 1 + random_rows(1, 1, hidden_size, dtype, device, seed=4)[0, 0].contiguous() / 4
    reader = random_rows(n, 1, hidden_size, dtype, device, seed=5)[:, 0].contiguous()
    reader /= hidden_size**0.5
    biases = [
        random_rows(1, 1, size, dtype, device, seed=6)[0, 0].contiguous() if with_bias else None
        for size in (hidden_size, n)
    ]
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    exact_total = all_residual.float() + oracle.linear(all_x.float(), weight, biases[0])
    plain_total = all_residual + oracle.linear(all_x, weight, biases[0])
    exact = oracle.rms_norm(exact_total, norm_weight.float(), eps)
    plain = oracle.rms_norm(plain_total, norm_weight, eps)
    exact, plain = oracle.linear(exact, reader, biases[1]), oracle.linear(plain, reader, biases[1])
    outs = []
    for _ in range(2):
        residual = all_residual[:num_rows].clone()
        scaled = poisoned(residual[:, None, :1].expand(-1, 1, hidden_size))[:, 0]
        layer = (weight, biases[0], norm_weight, eps, counters)
        open_norm = skinny_linear_add_norm(scaled, residual, all_x[:num_rows], *layer)
        oracle.assert_close(residual, exact_total, plain_total)
        assert not counters.any()
        out = poisoned(residual[:, None, :1].expand(-1, 1, n))[:, 0]
        skinny_linear(out, scaled, reader, biases[1], counters, open_norm)
        oracle.assert_close(out, exact, plain)
        outs.append(out)
    assert torch.equal(*outs)
    gated = poisoned(residual[:, None, :1].expand(-1, 1, n // 2))[:, 0]
    skinny_gated_linear(gated, scaled, reader, biases[1], open_norm)
    oracle.assert_close(gated, oracle.silu_and_mul(exact), oracle.silu_and_mul(plain))


def check_embedding(
    num_rows: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> None:
    """Checks known tokens and, for every other row, those that a step before it sampled."""
    table = random_rows(7, 1, hidden_size, dtype, device, seed=1)[:, 0].contiguous()
    weight = 1 + 0.3 * random_rows(1, 1, hidden_size, dtype, device, seed=2)[0, 0]
    ids = torch.arange(num_rows, device=device) * 5 % 7
    sampled = torch.tensor([3, 6, 0, 2], device=device)
    sources = torch.arange(num_rows, device=device) % 4
    sources[1::2] = -1
    for given, tokens in ((None, ids), (sources, torch.where(sources < 0, ids, sampled[sources]))):
        out, residual = (poisoned(table[tokens][:, None])[:, 0] for _ in range(2))
        embed_rows(out, residual, ids, given, sampled, table, weight, 1e-5)
        assert torch.equal(residual, table[tokens])
        exact = oracle.rms_norm(table[tokens].float(), weight.float(), 1e-5)
        oracle.assert_close(out, exact, oracle.rms_norm(table[tokens], weight, 1e-5))


def check_greedy_tokens(
    num_rows: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> None:
    """Checks that the first of equals counts, at borders of chunks, too; run twice."""
    logits = random_rows(num_rows, 1, vocab_size, dtype, device, seed=1)[:, 0]
    last = vocab_size - 1
    winners = [[last], [0, last], [min(TILE_N, last), last], [min(TILE_N - 1, last), last], [1]]
    for row, ids in zip(range(num_rows), winners, strict=False):
        logits[row, ids] = 100.0
    if num_rows > 5:
        logits[5, 2] = float("nan")
        logits[6] = float("-inf")
    expected = [int((row == row.max()).nonzero()[0]) for row in logits.nan_to_num(nan=torch.inf)]
    counters = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
    on_host = torch.full((3, num_rows + 2), -7, pin_memory=device == "cuda")
    for slot in (2, 0):
        token_ids = torch.full((num_rows,), -7, device=device)
        greedy_tokens(token_ids, on_host, torch.tensor([slot], device=device), logits, counters)
        assert token_ids.tolist() == expected
        assert on_host.tolist()[slot] == [*expected, -7, -7]
    assert on_host.tolist()[1] == [-7] * (num_rows + 2)
    assert not counters.any()
