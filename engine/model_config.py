"""The shape of a decoder model, read from a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError, ConfigError
from engine.rope import RopeConfig

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_GROUP_SIZE = 16


@dataclass(frozen=True, slots=True)
class _Family:
    """What distinguishes one architecture from the others."""

    qkv_bias: bool | str
    """Always, never, or the config key that says so."""
    out_bias: bool | str
    mlp_bias: bool | str
    qk_norm: bool
    window_switch: str | None
    """Config key that must be true for `sliding_window` to count; None: it always counts."""


_SILU = ("silu", "swish")

ARCHITECTURES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family("attention_bias", "attention_bias", "mlp_bias", False, None),
    "MistralForCausalLM": _Family(False, False, False, False, None),
    "Qwen2ForCausalLM": _Family(True, False, False, False, "use_sliding_window"),
    "Qwen3ForCausalLM": _Family(
        "attention_bias", "attention_bias", False, True, "use_sliding_window"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder with grouped-query attention, rotary positions and a gated SiLU MLP.

    Args:
        architecture: One of `ARCHITECTURES`.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_layers: Decoder layers.
        num_q_heads: Query heads.
        num_kv_heads: KV heads; divides `num_q_heads`.
        head_dim: Elements of a head, one of `HEAD_DIMS`.
        rms_norm_eps: Added to the mean square before its root.
        rope: Rotary position embedding.
        max_position_embeddings: The context length the model was made for, in tokens.
        tie_word_embeddings: The head's weights are the embedding's.
        qkv_bias: Query, key and value projections have biases.
        out_bias: The attention's output projection has a bias.
        mlp_bias: The MLP's projections have biases.
        qk_norm: Heads of Q and K are RMS-normalised before the rotary embedding (Qwen3).
        sliding_window: Attention reaches this many tokens back; None is all.
        dtype: The checkpoint's own dtype.
        eos_token_ids: Tokens that end a text, from the model's configuration.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    dtype: str
    eos_token_ids: frozenset[int]

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ConfigError(f"head_dim must be one of {HEAD_DIMS}, the model has {self.head_dim}")
        if self.num_q_heads % self.num_kv_heads or self.group_size > MAX_GROUP_SIZE:
            raise ConfigError(
                f"num_q_heads must be 1 to {MAX_GROUP_SIZE} times num_kv_heads, the model has "
                f"{self.num_q_heads} and {self.num_kv_heads}"
            )

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights, biases and norms left out."""
        qkv = (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = self.hidden_size * (qkv + self.num_q_heads * self.head_dim)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp) + embeddings

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Read a parsed `config.json`.

        Args:
            config: The file's content.
            generation_config: That of `generation_config.json`; its end tokens count too.

        Raises:
            CheckpointError: The architecture, its activation or its quantization is unsupported,
                or a needed key is missing.
            ConfigError: A value is outside what NEO's kernels cover.
        """
        architecture = (config.get("architectures") or ["(none)"])[0]
        family = ARCHITECTURES.get(architecture)
        if family is None:
            raise CheckpointError(
                f"architecture {architecture} is not supported; "
                f"supported: {', '.join(sorted(ARCHITECTURES))}"
            )
        activation = config.get("hidden_act") or _SILU[0]
        if activation not in _SILU:
            raise CheckpointError(f"activation {activation} is not supported; supported: silu")
        if config.get("quantization_config"):
            raise CheckpointError(
                "the checkpoint is quantized, which NEO does not support; use the original in "
                "bfloat16, float16 or float32, or a GGUF file"
            )
        try:
            return cls._from_family(architecture, family, config, generation_config or {})
        except KeyError as error:
            raise CheckpointError(f"config.json lacks the key {error}") from error
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"config.json has an unusable value: {error}") from error

    @classmethod
    def _from_family(
        cls,
        architecture: str,
        family: _Family,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
    ) -> "ModelConfig":
        def flag(value: bool | str) -> bool:
            return bool(config.get(value, False)) if isinstance(value, str) else value

        num_q_heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // num_q_heads)
        max_positions = int(config["max_position_embeddings"])
        return cls(
            architecture=architecture,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_q_heads=num_q_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_q_heads),
            head_dim=head_dim,
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope=RopeConfig.from_hf(config, head_dim, max_positions),
            max_position_embeddings=max_positions,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=flag(family.qkv_bias),
            out_bias=flag(family.out_bias),
            mlp_bias=flag(family.mlp_bias),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(config, family),
            dtype=_dtype_name(config),
            eos_token_ids=_token_ids(config) | _token_ids(generation_config),
        )

    def check_max_model_len(self, max_model_len: int) -> None:
        """Check that requests of this many tokens are computed as the model means it.

        Raises:
            ConfigError: The model was not made for so long a context.
        """
        longest = self.rope.max_positions
        if max_model_len > longest:
            raise ConfigError(
                f"max_model_len must be at most {longest}, the model's context length, "
                f"got {max_model_len}"
            )
        if self.sliding_window is not None and max_model_len > self.sliding_window:
            raise ConfigError(
                f"the model attends through a sliding window of {self.sliding_window} tokens, "
                f"which NEO does not support; use --max-model-len {self.sliding_window} or less"
            )


def _sliding_window(config: Mapping[str, Any], family: _Family) -> int | None:
    window = config.get("sliding_window")
    if not window or (family.window_switch and not config.get(family.window_switch, False)):
        return None
    layer_types = config.get("layer_types")
    if layer_types and all(kind == "full_attention" for kind in layer_types):
        return None
    return int(window)


def _dtype_name(config: Mapping[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(name).removeprefix("torch.")


def _token_ids(config: Mapping[str, Any]) -> frozenset[int]:
    value = config.get("eos_token_id")
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset({int(value)})
