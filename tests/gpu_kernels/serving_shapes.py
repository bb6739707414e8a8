"""Launches that differ only in run-time values; after `precompile` they must compile nothing."""

import torch

from gpu_kernels.activation import silu_and_mul
from gpu_kernels.decode_attention import paged_decode_attention
from gpu_kernels.embedding import embed_rows
from gpu_kernels.few_rows import OpenNorm
from gpu_kernels.greedy import greedy_tokens
from gpu_kernels.handover import BELL_WORDS, receive_rows, send_rows
from gpu_kernels.kv_store import store_kv
from gpu_kernels.kv_swap import swap_in_kv, swap_out_kv
from gpu_kernels.linear import LinearLayers
from gpu_kernels.norm import add_rms_norm, rms_norm
from gpu_kernels.pcie_attention import ENTRY_FIELDS, host_pool_attention
from gpu_kernels.prefill_attention import paged_prefill_attention
from gpu_kernels.rope_store import rope_store_kv
from gpu_kernels.rotating_rows import depart_rows, rejoin_rows
from gpu_kernels.warmup import ModelShape


def launch_serving_shapes(shape: ModelShape, device: str) -> None:
    """Odd batch sizes and table widths, 1, multiples of 16, metadata at misaligned addresses."""
    for num_rows, offset, max_seq_len in ((1, 1, 1), (3, 0, 5000), (16, 1, 300), (17, 2, 100_000)):
        width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
        qkv = torch.zeros(num_rows + 1, width, dtype=shape.dtype, device=device)[1:]
        heads = qkv.view(num_rows, -1, shape.head_dim)
        q, k, v = heads.split([shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        out = torch.zeros_like(q)
        pool_shape = (num_rows + 5, shape.num_kv_heads, shape.block_size, shape.head_dim)
        pools = torch.zeros(3, 2, *pool_shape, dtype=shape.dtype, device=device)
        k_cache, v_cache = pools[1]

        def ints(*sizes: int, dtype: torch.dtype, offset: int = offset) -> torch.Tensor:
            count = int(torch.Size(sizes).numel())
            return torch.zeros(count + 4, dtype=dtype, device=device)[offset:][:count].view(sizes)

        tables = ints(num_rows, 2 * num_rows + 1, dtype=torch.int32)
        seq_lens = ints(num_rows, dtype=torch.int32) + 0
        seq_lens = ints(num_rows, dtype=torch.int32).copy_(seq_lens)
        counters = ints(num_rows * shape.num_kv_heads, dtype=torch.int32)
        for num_splits in (None, 1, 3, 16):
            paged_decode_attention(
                out, q, k_cache, v_cache, tables, seq_lens, 0.1,
                max_seq_len=max_seq_len, num_splits=num_splits, counters=counters,
            )  # fmt: skip
        cu_seqlens_q = ints(num_rows + 1, dtype=torch.int32)
        paged_prefill_attention(out, q, k_cache, v_cache, tables, cu_seqlens_q, seq_lens, 0.1)
        slots = ints(num_rows, dtype=torch.int64)
        table = torch.zeros(1000, shape.rotary_dim or shape.head_dim, device=device)
        weight = torch.ones(shape.head_dim, dtype=shape.dtype, device=device)
        norm_weight = weight if shape.has_qk_norm else None
        rope_store_kv(
            q, k, v, slots, table, k_cache, v_cache, slots,
            q_norm_weight=norm_weight, k_norm_weight=norm_weight,
        )  # fmt: skip
        store_kv(k, v, k_cache, v_cache, slots)
        # Pinned here, on the device in the warm-up: one variant.
        hosts = torch.zeros(3, 2, *pool_shape, dtype=shape.dtype, pin_memory=device == "cuda")
        k_host = hosts[:, 0].view(3, *pool_shape[:2], shape.head_dim, shape.block_size)
        ids = ints(num_rows + 5, dtype=torch.int32)
        ids.copy_(torch.arange(num_rows + 5))
        swap_out_kv(pools[:, 0], pools[:, 1], ids, k_host, hosts[:, 1], ids)
        swap_in_kv(pools[:, 0], pools[:, 1], ids, k_host, hosts[:, 1], ids)
        swap_in_kv(pools[:, 0], pools[:, 1], ids, k_host, hosts[:, 1], ids, max_programs=1)
        last = slice(2, 3)
        swap_in_kv(pools[last, 0], pools[last, 1], ids, k_host[last], hosts[last, 1], ids)
        pinned = {"pin_memory": device == "cuda"}
        slots_of_rows = torch.zeros(3, num_rows + offset, width, dtype=shape.dtype, **pinned)
        answers = torch.zeros(3, num_rows, q[0].numel(), dtype=shape.dtype, **pinned)
        words = torch.zeros(3, 2, BELL_WORDS, dtype=torch.int32, **pinned)
        parameters = ints(3, dtype=torch.int32)
        send_rows(slots_of_rows, qkv, words, parameters, ints(1, dtype=torch.int32), 31)
        waited = torch.zeros(1, dtype=torch.int64, **pinned)
        seen = ints(3, dtype=torch.int32)
        receive_rows(out.flatten(1), answers, words, parameters, seen, waited, offset, limit_s=2.0)
        hidden = torch.zeros(num_rows, shape.hidden_size, dtype=shape.dtype, device=device)
        sent, kept = torch.zeros(3, *qkv.shape, dtype=shape.dtype, device=device), hidden.clone()
        depart_rows(
            sent[1], kept, qkv, hidden, slots, slots, table,
            num_q_heads=shape.num_q_heads, num_kv_heads=shape.num_kv_heads,
            q_norm_weight=norm_weight, k_norm_weight=norm_weight,
        )  # fmt: skip
        rejoin_rows(out.flatten(1), hidden, out.flatten(1).clone(), slots, kept, slots)
        entries = ints(ENTRY_FIELDS, num_rows, dtype=torch.int32)
        pools_of_all = k_host.flatten(0, 1), hosts[:, 1].flatten(0, 1).contiguous()
        if device == "cuda":
            pools_of_all = pools_of_all[0].pin_memory(), pools_of_all[1].pin_memory()
        host_pool_attention(out.flatten(1), qkv, entries, ids, *pools_of_all, 0.1)
        rms_norm(hidden, hidden, hidden[0].clone(), 1e-5)
        add_rms_norm(hidden, hidden, hidden.clone(), hidden[0].clone(), 1e-5)
        ids = (slots.zero_(), slots, slots)
        embed_rows(hidden.clone(), hidden, *ids, hidden, hidden[0].clone(), 1e-5)
        embed_rows(hidden.clone(), hidden, slots, None, slots, hidden, hidden[0].clone(), 1e-5)
        logits = torch.zeros(num_rows, shape.vocab_size, dtype=shape.dtype, device=device)
        on_host = torch.zeros(2, num_rows + offset, dtype=torch.int64, **pinned)
        greedy_tokens(slots, on_host, slots[:1].clone(), logits, counters)
        sizes = (num_rows, 2 * shape.intermediate_size)
        gate_up = torch.zeros(sizes, dtype=shape.dtype, device=device)
        silu_and_mul(gate_up[:, : shape.intermediate_size].clone(), gate_up)
        layers = LinearLayers(torch.device(device), always_own=True)

        def linear(size: tuple[int, int, bool]) -> tuple[torch.Tensor, torch.Tensor | None]:
            n, k, has_bias = size
            weight = torch.zeros(n, k, dtype=shape.dtype, device=device)
            return weight, weight[:, 0].clone() if has_bias else None

        qkv_layer, out_layer, down_layer = map(linear, shape.linear_sizes().values())
        gate_up = linear(shape.gated_size())
        x, norm = layers.linear(hidden, *qkv_layer), (hidden, hidden[0].clone(), 1e-5)
        x = x[:, : out_layer[0].shape[1]]
        following = layers.linear_add_norm(x, *out_layer, *norm, gate_up[0])
        x = layers.gated_linear(*_read(following, gate_up))
        layers.linear_add_norm(x, *down_layer, *norm, None)
        following = layers.linear_add_norm(x, *down_layer, *norm, qkv_layer[0])
        layers.linear(*_read(following, qkv_layer))


def _read(
    normed: tuple[torch.Tensor, OpenNorm | None], layer: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, OpenNorm | None]:
    """Returns the arguments of a layer that reads what another one left."""
    return normed[0], *layer, normed[1]
