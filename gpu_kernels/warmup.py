"""Compiles all kernels of a model ahead of time, and counts what was compiled.

Every launcher runs once on tiny tensors for each variant that serving can ask for; nothing else
depends on run-time values, because the kernels do not specialise on them. Compiled code goes to
Triton's cache on disk, so a later process only loads it.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from gpu_kernels import (
    activation,
    decode_attention,
    embedding,
    few_rows,
    greedy,
    handover,
    kv_store,
    kv_swap,
    merge_splits,
    norm,
    pcie_attention,
    prefill_attention,
    rope_store,
    rotating_rows,
)
from gpu_kernels.linear import LinearLayers
from gpu_kernels.tiles import gpu_class, prefill_tiles, short_prefill_tiles

KERNELS: tuple[Any, ...] = (
    decode_attention.decode_attention_kernel,
    merge_splits.merge_splits_kernel,
    prefill_attention.prefill_attention_kernel,
    rope_store.rope_store_kernel,
    kv_store.store_kv_kernel,
    kv_swap.swap_kv_kernel,
    handover.send_rows_kernel,
    handover.receive_rows_kernel,
    rotating_rows.depart_rows_kernel,
    rotating_rows.rejoin_rows_kernel,
    pcie_attention.host_pool_attention_kernel,
    norm.rms_norm_kernel,
    activation.silu_and_mul_kernel,
    few_rows.skinny_linear_kernel,
    few_rows.skinny_gated_linear_kernel,
    embedding.embed_rows_kernel,
    greedy.greedy_tokens_kernel,
)
SKINNY_ROWS = (16, 32)
"""One for each tile height that linear layers of a few rows are compiled for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model decides which kernels it needs."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    block_size: int
    dtype: torch.dtype
    rotary_dim: int | None = None
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False

    def linear_sizes(self) -> dict[str, tuple[int, int, bool]]:
        """Outputs, inputs and bias of the linear layers that are computed by themselves."""
        q_width = self.num_q_heads * self.head_dim
        qkv_width = q_width + 2 * self.num_kv_heads * self.head_dim
        return {
            "QKV": (qkv_width, self.hidden_size, self.has_qkv_bias),
            "out": (self.hidden_size, q_width, self.has_out_bias),
            "down": (self.hidden_size, self.intermediate_size, self.has_mlp_bias),
        }

    def gated_size(self) -> tuple[int, int, bool]:
        """The same of the one whose outputs are multiplied with each other."""
        return 2 * self.intermediate_size, self.hidden_size, self.has_mlp_bias


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """One launch of the warm-up and how long it took; `was_new` if it compiled or loaded code."""

    name: str
    seconds: float
    was_new: bool


def count_compiled_variants() -> int:
    """Number of kernel variants this process holds on all devices.

    Take it before and after serving: a difference is a variant that `precompile` missed and that
    made a request wait for the compiler.
    """
    return sum(len(caches[0]) for kernel in KERNELS for caches in kernel.device_caches.values())


def precompile(shape: ModelShape, device: torch.device) -> list[CompiledKernel]:
    """Compiles every kernel variant that serving this model on this GPU can launch.

    Args:
        shape: The model's sizes, as held by one GPU.
        device: A CUDA device; it must be the current one.

    Returns:
        One entry a launch, in order of compilation.
    """
    compiled = run_all_variants(shape, device)
    torch.cuda.synchronize(device)
    compiled += run_linear_variants(shape, device)
    torch.cuda.synchronize(device)
    return compiled


class _Launches:
    """Launches kernels and keeps what that took."""

    def __init__(self) -> None:
        self.compiled: list[CompiledKernel] = []

    def __call__(self, name: str, launcher: Any, *args: Any, **kwargs: Any) -> Any:
        """Launch one and return what it returns."""
        before, start = count_compiled_variants(), time.perf_counter()
        result = launcher(*args, **kwargs)
        was_new = count_compiled_variants() > before
        seconds = time.perf_counter() - start
        self.compiled.append(CompiledKernel(name=name, seconds=seconds, was_new=was_new))
        return result


def run_linear_variants(shape: ModelShape, device: torch.device) -> list[CompiledKernel]:
    """Launches every variant of linear layers of a few rows; see `precompile`."""
    layers, launch = LinearLayers(device, always_own=True), _Launches()
    sizes = {**shape.linear_sizes(), "gate and up": shape.gated_size()}
    # One block of memory for all: at this point the model's own weights are there, too.
    memory = torch.zeros(max(n * k for n, k, _ in sizes.values()), dtype=shape.dtype, device=device)
    weights = {name: memory[: n * k].view(n, k) for name, (n, k, _) in sizes.items()}
    biases = {name: memory[:n] if has_bias else None for name, (n, _, has_bias) in sizes.items()}
    norm_weight = memory[: shape.hidden_size]
    for num_rows in SKINNY_ROWS:
        rows = {name: memory.new_zeros(num_rows, k) for name, (_, k, _) in sizes.items()}
        residual = memory.new_zeros(num_rows, shape.hidden_size)

        def add_norm(name: str, following: str | None, rows: Any = rows, to: Any = residual) -> Any:
            last = None if following is None else weights[following]
            label, layer = f"{name} and norm, {len(to)} rows", (weights[name], biases[name])
            norm = (to, norm_weight, 1e-6, last)
            return launch(label, layers.linear_add_norm, rows[name], *layer, *norm)

        # A layer's variants: the first one's QKV is behind a norm by itself, and so is the head.
        label, qkv = f"QKV, {num_rows} rows", (weights["QKV"], biases["QKV"])
        launch(label, layers.linear, rows["QKV"], *qkv)
        x, lacking = add_norm("out", "gate and up")
        gate_up = (weights["gate and up"], biases["gate and up"])
        launch(f"gate and up, {num_rows} rows", layers.gated_linear, x, *gate_up, lacking)
        add_norm("down", None)
        x, lacking = add_norm("down", "QKV")
        launch(label, layers.linear, x, *qkv, lacking)
    return launch.compiled


def run_all_variants(shape: ModelShape, device: torch.device) -> list[CompiledKernel]:
    """Launches every variant once on tiny tensors; see `precompile`."""
    tokens, blocks = 2, 2
    width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim

    def zeros(*sizes: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    qkv = zeros(tokens, width)
    q_width, kv_width = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    q, k, v = (
        part.view(tokens, -1, shape.head_dim)
        for part in qkv.split([q_width, kv_width, kv_width], dim=1)
    )
    out = zeros(tokens, shape.num_q_heads, shape.head_dim)
    pool_shape = (blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
    k_cache, v_cache = zeros(*pool_shape), zeros(*pool_shape)
    ids = torch.arange(blocks, dtype=torch.int32, device=device)
    # A pinned CPU tensor takes the same variant as a tensor on the device.
    k_host = zeros(1, blocks, shape.num_kv_heads, shape.head_dim, shape.block_size)
    swapped = (k_cache[None], v_cache[None], ids, k_host, zeros(1, *pool_shape), ids)
    tables = zeros(tokens, 1, dtype=torch.int32)
    seq_lens = torch.ones(tokens, dtype=torch.int32, device=device)
    cu_seqlens_q = torch.arange(tokens + 1, dtype=torch.int32, device=device)
    positions = torch.arange(tokens, dtype=torch.int64, device=device)
    cos_sin = zeros(tokens, shape.rotary_dim or shape.head_dim, dtype=torch.float32)
    head_weight = zeros(shape.head_dim) if shape.has_qk_norm else None
    hidden, residual = zeros(tokens, shape.hidden_size), zeros(tokens, shape.hidden_size)
    gate_up = zeros(tokens, 2 * shape.intermediate_size)
    activated = zeros(tokens, shape.intermediate_size)
    launch = _Launches()

    counters = zeros(tokens * shape.num_kv_heads, dtype=torch.int32)
    for num_splits in (1, 2, decode_attention.MAX_MERGED_SPLITS + 1):
        launch(
            f"decode attention, {num_splits} splits", decode_attention.paged_decode_attention,
            out, q, k_cache, v_cache, tables, seq_lens, 1.0,
            max_seq_len=1, num_splits=num_splits, counters=counters,
        )  # fmt: skip
    shape_class = (shape.head_dim, shape.dtype, gpu_class(device))
    for name, tiles in (
        ("short prefill attention", short_prefill_tiles(*shape_class)),
        ("prefill attention", prefill_tiles(*shape_class)),
    ):
        launch(
            name, prefill_attention.paged_prefill_attention,
            out, q, k_cache, v_cache, tables, cu_seqlens_q, seq_lens, 1.0, tiles=tiles,
        )  # fmt: skip
    launch(
        "rope and store", rope_store.rope_store_kv,
        q, k, v, positions, cos_sin, k_cache, v_cache, positions,
        q_norm_weight=head_weight, k_norm_weight=head_weight,
    )  # fmt: skip
    launch("store", kv_store.store_kv, k, v, k_cache, v_cache, positions)
    launch("swap out", kv_swap.swap_out_kv, *swapped)
    launch("swap in", kv_swap.swap_in_kv, *swapped)
    words = zeros(2, handover.BELL_WORDS, dtype=torch.int32)[None]
    parameters, word = zeros(3, dtype=torch.int32), zeros(1, dtype=torch.int32)
    launch("send rows", handover.send_rows, qkv[None], qkv, words, parameters, word, 0)
    launch(
        "receive rows", handover.receive_rows,
        out.flatten(1), out.flatten(1)[None], words, parameters, word,
        zeros(1, dtype=torch.int64), 0, limit_s=1.0,
    )  # fmt: skip
    launch(
        "depart rows", rotating_rows.depart_rows,
        qkv, residual, qkv, residual, positions, positions, cos_sin,
        num_q_heads=shape.num_q_heads, num_kv_heads=shape.num_kv_heads,
        q_norm_weight=head_weight, k_norm_weight=head_weight,
    )  # fmt: skip
    launch(
        "rejoin rows", rotating_rows.rejoin_rows,
        out.flatten(1), residual, out.flatten(1), positions, residual, positions,
    )  # fmt: skip
    launch(
        "attention over PCIe", pcie_attention.host_pool_attention,
        out.flatten(1), qkv, zeros(pcie_attention.ENTRY_FIELDS, 1, dtype=torch.int32), ids,
        k_host[0], v_cache, 1.0,
    )  # fmt: skip
    launch("norm", norm.rms_norm, hidden, hidden, hidden[0], 1e-6)
    launch("add and norm", norm.add_rms_norm, hidden, hidden, residual, hidden[0], 1e-6)
    ids_and_sources = (positions, positions, positions)
    last = (hidden[0], 1e-6)
    launch("embed", embedding.embed_rows, hidden, residual, *ids_and_sources, hidden, *last)
    launch(
        "embed known tokens", embedding.embed_rows,
        hidden, residual, positions, None, positions, hidden, *last,
    )  # fmt: skip
    launch(
        "greedy tokens", greedy.greedy_tokens,
        positions, positions[None], positions[:1], zeros(tokens, shape.vocab_size), counters,
    )  # fmt: skip
    launch("silu and mul", activation.silu_and_mul, activated, gate_up)
    return launch.compiled
