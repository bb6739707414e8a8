"""A CUDA GPU plays the device: cuBLAS through torch for linear layers, Triton for the rest."""

import torch

from engine.backends.base import AttentionShape, LayerNorms
from engine.batch import Batch
from engine.model_config import ModelConfig
from gpu_kernels.activation import silu_and_mul
from gpu_kernels.decode_attention import paged_decode_attention
from gpu_kernels.norm import add_rms_norm, rms_norm
from gpu_kernels.prefill_attention import paged_prefill_attention
from gpu_kernels.rope_store import rope_store_kv
from gpu_kernels.warmup import ModelShape, precompile


class CudaBackend:
    """`Backend` on one GPU. The device pool is token-major: `[block, head, token, element]`.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._shape: AttentionShape | None = None
        self._k_cache = torch.empty(0)
        self._v_cache = torch.empty(0)

    @property
    def description(self) -> str:
        """What computes what, for people."""
        name = torch.cuda.get_device_name(self.device)
        return f"linear layers by cuBLAS, attention by Triton, on {name}"

    def prepare(self, config: ModelConfig, shape: AttentionShape) -> int:
        """Compile the model's kernels, or load them from Triton's cache."""
        with torch.cuda.device(self.device):
            compiled = precompile(
                ModelShape(
                    num_q_heads=shape.num_q_heads,
                    num_kv_heads=shape.num_kv_heads,
                    head_dim=shape.head_dim,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    block_size=shape.block_size,
                    dtype=shape.dtype,
                    has_qk_norm=config.qk_norm,
                ),
                self.device,
            )
        return len(compiled)

    def allocate_kv_cache(self, shape: AttentionShape, num_blocks: int) -> None:
        """Make the device pool; see `Backend`."""
        # Dropped first: the pool of the memory probe and the real one must not exist together.
        self._k_cache = self._v_cache = torch.empty(0)
        size = (
            shape.num_layers,
            num_blocks,
            shape.num_kv_heads,
            shape.block_size,
            shape.head_dim,
        )
        self._k_cache = torch.zeros(size, dtype=shape.dtype, device=self.device)
        self._v_cache = torch.zeros(size, dtype=shape.dtype, device=self.device)
        self._shape = shape

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return `x` normalised and scaled; see `Backend`."""
        out = torch.empty_like(x)
        rms_norm(out, x, weight, eps)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add in place and normalise; see `Backend`."""
        out = torch.empty_like(x)
        add_rms_norm(out, x, residual, weight, eps)
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return the gated activation; see `Backend`."""
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        silu_and_mul(out, gate_up)
        return out

    def attention(
        self,
        layer: int,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: Batch,
        norms: LayerNorms | None,
    ) -> torch.Tensor:
        """Rotate, store and attend; see `Backend`."""
        shape = self._shape
        assert shape is not None, "allocate_kv_cache comes first"
        heads = [shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads]
        q, k, v = qkv.view(qkv.shape[0], -1, shape.head_dim).split(heads, dim=1)
        k_cache, v_cache = self._k_cache[layer], self._v_cache[layer]
        rope_store_kv(
            q,
            k,
            v,
            batch.positions,
            cos_sin,
            k_cache,
            v_cache,
            batch.slot_mapping,
            q_norm_weight=norms.q if norms else None,
            k_norm_weight=norms.k if norms else None,
            norm_eps=norms.eps if norms else 1e-6,
        )
        out = qkv.new_empty(qkv.shape[0], shape.num_q_heads, shape.head_dim)
        num_decodes = batch.num_decodes
        if num_decodes:
            paged_decode_attention(
                out[:num_decodes],
                q[:num_decodes],
                k_cache,
                v_cache,
                batch.block_tables[:num_decodes],
                batch.seq_lens[:num_decodes],
                shape.softmax_scale,
                max_seq_len=max(batch.context_lens[:num_decodes]),
            )
        if batch.num_prefill_tokens:
            paged_prefill_attention(
                out[num_decodes:],
                q[num_decodes:],
                k_cache,
                v_cache,
                batch.block_tables[num_decodes:],
                batch.prefill_cu_seqlens_q,
                batch.seq_lens[num_decodes:],
                shape.softmax_scale,
                max_seqlen_q=max(batch.query_lens[num_decodes:]),
            )
        return out.flatten(1)

    def close(self) -> None:
        """Free the device pool."""
        self._k_cache = self._v_cache = torch.empty(0)
