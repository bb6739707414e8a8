"""The CPU plays the device: torch for everything but decode attention, which is NEO's own kernel.

The device pool has the host layout here, because the processor that reads it is the CPU.
"""

import torch
import torch.nn.functional as F

from cpu_kernels.attention import CpuAttention
from cpu_kernels.checks import host_kv_shapes
from cpu_kernels.errors import KernelBuildError
from engine.backends.base import AttentionShape, LayerNorms
from engine.batch import Batch
from engine.errors import CapacityError, ConfigError
from engine.host_memory import allocate_host_tensor
from engine.model_config import ModelConfig
from engine.paths import cache_dir


class CpuBackend:
    """`Backend` on the host's processor.

    Args:
        num_threads: Attention threads; None is all cores but one.

    Raises:
        ConfigError: The CPU kernels are not built.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self.device = torch.device("cpu")
        try:
            self._kernels = CpuAttention(cache_dir(), num_threads)
        except KernelBuildError as error:
            raise ConfigError(str(error)) from error
        self._shape: AttentionShape | None = None
        self._k_cache = torch.empty(0)
        self._v_cache = torch.empty(0)

    @property
    def description(self) -> str:
        """What computes what, for people."""
        return (
            f"linear layers by torch with {torch.get_num_threads()} threads, "
            f"decode attention by ISPC kernels with {self._kernels.num_threads}"
        )

    def prepare(self, config: ModelConfig, shape: AttentionShape) -> int:
        """Nothing to do: the kernels are built ahead of time for every model."""
        return 0

    def allocate_kv_cache(self, shape: AttentionShape, num_blocks: int) -> None:
        """Make the device pool; see `Backend`."""
        k_shape, v_shape = host_kv_shapes(
            num_blocks, shape.num_kv_heads, shape.head_dim, shape.block_size
        )
        try:
            self._k_cache = allocate_host_tensor((shape.num_layers, *k_shape), shape.dtype)
            self._v_cache = allocate_host_tensor((shape.num_layers, *v_shape), shape.dtype)
        except (OSError, RuntimeError) as error:
            raise CapacityError(
                f"cannot allocate {num_blocks * shape.block_bytes / 2**30:.1f} GiB of KV cache; "
                "lower --host-kv-gb or --device-kv-blocks"
            ) from error
        self._shape = shape

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return `x` normalised and scaled; see `Backend`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add in place and normalise; see `Backend`."""
        residual += x
        return self.rms_norm(residual, weight, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return the gated activation; see `Backend`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attention(
        self,
        layer: int,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: Batch,
        norms: LayerNorms | None,
    ) -> torch.Tensor:
        """Rotate, store and attend; see `Backend`."""
        shape = self._checked_shape()
        heads = [shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads]
        q, k, v = qkv.view(qkv.shape[0], -1, shape.head_dim).split(heads, dim=1)
        if norms is not None:
            q = self.rms_norm(q, norms.q, norms.eps)
            k = self.rms_norm(k, norms.k, norms.eps)
        cos, sin = cos_sin[batch.positions].to(qkv.dtype).unsqueeze(1).chunk(2, dim=-1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out = torch.empty_like(q)
        self._decode(layer, out, q, k, v, batch)
        self._prefill(layer, out, q, k, v, batch)
        return out.flatten(1)

    def _checked_shape(self) -> AttentionShape:
        assert self._shape is not None, "allocate_kv_cache comes first"
        return self._shape

    def _decode(
        self,
        layer: int,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Batch,
    ) -> None:
        rows = slice(0, batch.num_decodes)
        if batch.num_decodes == 0:
            return
        self._kernels.paged_decode_attention(
            out[rows],
            q[rows],
            self._k_cache[layer],
            self._v_cache[layer],
            batch.block_tables[rows],
            batch.seq_lens[rows],
            self._checked_shape().softmax_scale,
            k=k[rows],
            v=v[rows],
        )

    def _prefill(
        self,
        layer: int,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Batch,
    ) -> None:
        start = batch.num_decodes
        if batch.num_prefill_tokens == 0:
            return
        k_cache, v_cache = self._k_cache[layer], self._v_cache[layer]
        self._kernels.store_kv(k[start:], v[start:], k_cache, v_cache, batch.slot_mapping[start:])
        for row in range(batch.num_decodes, batch.num_seqs):
            query_len, context_len = batch.query_lens[row], batch.context_lens[row]
            rows = slice(start, start + query_len)
            keys, values = k[rows], v[rows]
            if context_len > query_len:
                keys, values = self._kernels.gather_kv(
                    k_cache, v_cache, batch.block_tables[row], context_len
                )
            out[rows] = self._causal_attention(q[rows], keys.to(q.dtype), values.to(q.dtype))
            start += query_len

    def _causal_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend `[Lq, heads, head_dim]` to `[Lk, kv_heads, head_dim]`, aligned at their ends."""
        num_queries, num_keys = q.shape[0], k.shape[0]
        mask = None
        if num_queries < num_keys:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._checked_shape().softmax_scale,
            enable_gqa=True,
        )
        return out.squeeze(0).transpose(0, 1)

    def close(self) -> None:
        """Stop the attention threads."""
        self._kernels.close()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + head_dim / 2) of each head: `[T, heads, head_dim]`."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
