"""Triton kernels for the device side: attention, KV movement and fused small operations."""

from gpu_kernels.activation import silu_and_mul
from gpu_kernels.decode_attention import paged_decode_attention
from gpu_kernels.embedding import embed_rows
from gpu_kernels.few_rows import (
    OpenNorm,
    skinny_gated_linear,
    skinny_linear,
    skinny_linear_add_norm,
)
from gpu_kernels.greedy import greedy_tokens
from gpu_kernels.handover import receive_rows, send_rows
from gpu_kernels.kv_store import store_kv
from gpu_kernels.kv_swap import swap_in_kv, swap_out_kv
from gpu_kernels.merge_splits import paged_decode_workspace_size
from gpu_kernels.norm import add_rms_norm, rms_norm
from gpu_kernels.pcie_attention import host_pool_attention
from gpu_kernels.prefill_attention import paged_prefill_attention
from gpu_kernels.rope_store import rope_store_kv
from gpu_kernels.rotating_rows import depart_rows, rejoin_rows

__all__ = [
    "OpenNorm",
    "add_rms_norm",
    "depart_rows",
    "embed_rows",
    "greedy_tokens",
    "host_pool_attention",
    "paged_decode_attention",
    "paged_decode_workspace_size",
    "paged_prefill_attention",
    "receive_rows",
    "rejoin_rows",
    "rms_norm",
    "rope_store_kv",
    "send_rows",
    "silu_and_mul",
    "skinny_gated_linear",
    "skinny_linear",
    "skinny_linear_add_norm",
    "store_kv",
    "swap_in_kv",
    "swap_out_kv",
]
