"""From GGUF metadata to the config.json and generation_config.json of the same model."""

import math
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, dequantize
from numpy.typing import NDArray

from engine.checkpoint.gguf_file import GGUFFile
from engine.errors import CheckpointError

MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SPECIAL_TOKEN_KEYS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
# Llama 3.1 to 3.3 differ in the factor only; GGUF keeps the resulting table, not the parameters.
LLAMA3_LOW_FREQ_FACTOR, LLAMA3_HIGH_FREQ_FACTOR = 1.0, 4.0
LLAMA3_ORIGINAL_LENGTH = 8192


def gguf_architecture(file: GGUFFile) -> str:
    """Return `general.architecture` after checking that it is supported.

    Raises:
        CheckpointError: It is not, or the file holds something else than one whole dense model.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in MODEL_CLASSES:
        raise CheckpointError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; "
            f"supported: {', '.join(MODEL_CLASSES)}"
        )
    if file.metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{file.path} is one of {file.metadata['split.count']} parts; "
            "merge them first with llama-gguf-split --merge"
        )
    if file.metadata.get(f"{architecture}.expert_count", 0) > 0:
        raise CheckpointError(f"{file.path}: mixture-of-experts models are not supported")
    return str(architecture)


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """Return what the model's config.json says.

    Raises:
        CheckpointError: The architecture is unsupported, or metadata are missing or contradictory.
    """
    architecture = gguf_architecture(file)
    meta = _Metadata(file, architecture)
    num_heads, hidden_size = meta.integer("attention.head_count"), meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", hidden_size // max(num_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: {key} = {meta.integer(key)} differs from the head's {head_dim} "
                "dimensions, which is not supported"
            )
    config = {
        "architectures": [MODEL_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": _embedding_rows(file),
        "hidden_size": hidden_size,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.real("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, meta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "dtype": _dtype(file),
        **special_token_ids(file),
    }
    if window := meta.integer("attention.sliding_window", 0):
        config |= {"sliding_window": window, "use_sliding_window": True}
        if architecture == "llama":
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return config


def gguf_generation_config(file: GGUFFile) -> dict[str, Any]:
    """Return what the model's generation_config.json would say: the special tokens' ids.

    `eos_token_id` is a list when the file names an end-of-turn token beside the end of text.
    """
    ids: dict[str, Any] = dict(special_token_ids(file))
    stops = [ids.get("eos_token_id"), file.metadata.get("tokenizer.ggml.eot_token_id")]
    distinct = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if len(distinct) > 1:
        ids["eos_token_id"] = distinct
    return ids


def special_token_ids(file: GGUFFile) -> dict[str, int]:
    """Return the special tokens' ids under the names of config.json, such as `eos_token_id`.

    Ids outside the vocabulary are left out: converters write -1 for "none" in various ways.
    """
    ids = {}
    for name, key in SPECIAL_TOKEN_KEYS.items():
        token_id = file.metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(token_id, int) and 0 <= token_id < _embedding_rows(file):
            ids[name] = token_id
    return ids


class _Metadata:
    """Typed access to the keys below the architecture's name."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._file = file
        self._architecture = architecture

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int):
            raise CheckpointError(
                f"{self._file.path}: {self._architecture}.{key} should be one integer"
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """The shortest number that has this float32 value: 1e-05, not 9.999999747378752e-06."""
        value = self._get(key, default)
        if not isinstance(value, int | float):
            raise CheckpointError(
                f"{self._file.path}: {self._architecture}.{key} should be one number"
            )
        return float(str(np.float32(value)))

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"{self._architecture}.{key}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is None:
            raise CheckpointError(f"{self._file.path}: {self._architecture}.{key} is missing")
        return default if value is None else value


def _embedding_rows(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: the tensor token_embd.weight is missing")
    return file.tensors["token_embd.weight"].shape[0]


def _dtype(file: GGUFFile) -> str:
    """The type to compute in; quantised weights, of bfloat16 models all, keep bfloat16's range."""
    kinds = {tensor.quant_type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    floats = {GGMLQuantizationType.F16, GGMLQuantizationType.F32}
    return "float16" if kinds <= floats else "bfloat16"


def _rope_scaling(file: GGUFFile, meta: _Metadata, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, meta.real("rope.freq_base", 10000.0), head_dim)
    kind = meta.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta.real("rope.scaling.factor")}
    if kind != "yarn":
        raise CheckpointError(
            f"{file.path}: RoPE scaling {kind!r} is not supported; supported: linear, yarn, "
            "Llama 3's"
        )
    factor = meta.real("rope.scaling.factor")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": meta.integer("rope.scaling.original_context_length"),
    }
    for key in ("beta_fast", "beta_slow"):
        if meta.get(f"rope.scaling.yarn_{key}") is not None:
            scaling[key] = meta.real(f"rope.scaling.yarn_{key}")
    # llama.cpp multiplies this into YaRN's own factor; Hugging Face replaces that one.
    if (extra := meta.real("rope.scaling.attn_factor", 1.0)) != 1.0:
        scaling["attention_factor"] = extra * (0.1 * math.log(factor) + 1.0)
    return scaling


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Find the Llama 3 parameters that give the stored table of frequency divisors."""
    stored = dequantize(
        file.rows("rope_freqs.weight"), file.tensors["rope_freqs.weight"].quant_type
    ).ravel()
    factor = round(float(stored.max()), 3)
    if factor == 1.0 and stored.min() == 1.0:
        return None
    expected = llama3_divisors(factor, theta, head_dim)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise CheckpointError(
            f"{file.path}: the table rope_freqs.weight is not the one of Llama 3.1 to 3.3, "
            "others are not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_LENGTH,
    }


def llama3_divisors(factor: float, theta: float, head_dim: int) -> NDArray[np.float64]:
    """Return by what Llama 3.1 divides each rotary frequency, `[head_dim // 2]` float64.

    Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.

    Source: Llama 3.1's reference code, `apply_scaling` in llama_models/llama3/reference_impl.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = LLAMA3_ORIGINAL_LENGTH / wavelengths
    smooth = (turns - LLAMA3_LOW_FREQ_FACTOR) / (LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR)
    smooth = smooth.clip(0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))
