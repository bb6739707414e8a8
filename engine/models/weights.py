"""A decoder's parameters: their shapes, and how a checkpoint's tensors fill them.

Query, key and value projections are fused into one matrix, gate and up into another. Every
parameter is made once on the device; checkpoint tensors are copied into their part of it one at a
time, so that no second copy of the model ever exists.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from engine.errors import CheckpointError
from engine.model_config import ModelConfig

INIT_STD = 0.02
"""Standard deviation of dummy weights: small enough that activations stay finite in half."""


@dataclass(slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer. H is the hidden size, I the intermediate size, D the head's."""

    input_norm: torch.Tensor
    """`[H]`."""
    qkv: torch.Tensor
    """`[(num_q_heads + 2 * num_kv_heads) * D, H]`: query rows, then key, then value."""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    """`[D]`."""
    k_norm: torch.Tensor | None
    out: torch.Tensor
    """`[H, num_q_heads * D]`."""
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    """`[H]`."""
    gate_up: torch.Tensor
    """`[2 * I, H]`: gate rows, then up."""
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    """`[H, I]`."""
    down_bias: torch.Tensor | None


@dataclass(slots=True, kw_only=True)
class ModelWeights:
    """All parameters of a decoder."""

    embedding: torch.Tensor
    """`[vocab_size, H]`."""
    layers: list[LayerWeights]
    final_norm: torch.Tensor
    """`[H]`."""
    lm_head: torch.Tensor
    """`[vocab_size, H]`; the embedding itself if the two are tied."""
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    """Checkpoint name to the (view of a) parameter it fills."""


def allocate_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Make a decoder's parameters, not yet filled.

    Args:
        config: The model's shape.
        dtype: Of all parameters.
        device: Where they go.
    """
    targets: dict[str, torch.Tensor] = {}

    def make(name: str, *shape: int) -> torch.Tensor:
        targets[name] = torch.empty(shape, dtype=dtype, device=device)
        return targets[name]

    def fuse(prefix: str, suffix: str, parts: dict[str, int], *rest: int) -> torch.Tensor:
        fused = torch.empty((sum(parts.values()), *rest), dtype=dtype, device=device)
        for (name, _), view in zip(parts.items(), fused.split(list(parts.values())), strict=True):
            targets[f"{prefix}.{name}.{suffix}"] = view
        return fused

    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = make("model.embed_tokens.weight", vocab, hidden)
    layers = [
        _allocate_layer(config, f"model.layers.{index}", make, fuse)
        for index in range(config.num_layers)
    ]
    final_norm = make("model.norm.weight", hidden)
    tied = config.tie_word_embeddings
    lm_head = embedding if tied else make("lm_head.weight", vocab, hidden)
    return ModelWeights(
        embedding=embedding, layers=layers, final_norm=final_norm, lm_head=lm_head, targets=targets
    )


def _allocate_layer(
    config: ModelConfig,
    prefix: str,
    make: Callable[..., torch.Tensor],
    fuse: Callable[..., torch.Tensor],
) -> LayerWeights:
    hidden, inter, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_q_heads * head_dim, config.num_kv_heads * head_dim
    qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    gate_up = {"gate_proj": inter, "up_proj": inter}
    attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return LayerWeights(
        input_norm=make(f"{prefix}.input_layernorm.weight", hidden),
        qkv=fuse(attn, "weight", qkv, hidden),
        qkv_bias=fuse(attn, "bias", qkv) if config.qkv_bias else None,
        q_norm=make(f"{attn}.q_norm.weight", head_dim) if config.qk_norm else None,
        k_norm=make(f"{attn}.k_norm.weight", head_dim) if config.qk_norm else None,
        out=make(f"{attn}.o_proj.weight", hidden, q_size),
        out_bias=make(f"{attn}.o_proj.bias", hidden) if config.out_bias else None,
        mlp_norm=make(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=fuse(mlp, "weight", gate_up, hidden),
        gate_up_bias=fuse(mlp, "bias", gate_up) if config.mlp_bias else None,
        down=make(f"{mlp}.down_proj.weight", hidden, inter),
        down_bias=make(f"{mlp}.down_proj.bias", hidden) if config.mlp_bias else None,
    )


def load_weights(weights: ModelWeights, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a checkpoint's tensors into the parameters, casting them on the way.

    Args:
        weights: From `allocate_weights`.
        tensors: Name and tensor, one at a time, in any order.

    Raises:
        CheckpointError: A tensor is missing, has the wrong shape or is not part of the model.
    """
    missing = set(weights.targets)
    for name, tensor in tensors:
        target = weights.targets.get(name)
        if target is None:
            if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                continue  # tied models may carry a copy of the embedding; old ones a rope table
            raise CheckpointError(f"the checkpoint has a tensor that the model lacks: {name}")
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name} has shape {tuple(tensor.shape)}, "
                f"config.json says {tuple(target.shape)}"
            )
        target.copy_(tensor)
        missing.discard(name)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors of the model: {some} …")


def make_dummy_weights(weights: ModelWeights, seed: int) -> None:
    """Fill the parameters with reproducible noise; norms with ones.

    Args:
        weights: From `allocate_weights`.
        seed: The same seed gives the same weights on the same kind of device.
    """
    generator = torch.Generator(device=weights.embedding.device).manual_seed(seed)
    for name, target in weights.targets.items():
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        else:
            target.normal_(0.0, INIT_STD, generator=generator)
