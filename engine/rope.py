"""Rotary position embeddings: their frequencies, with the scalings that models in use need.

The formulas follow their papers and agree with Hugging Face transformers. `dynamic` (NTK-aware)
scaling depends on the length of a text; a paged cache cannot re-rotate old keys, so NEO fixes the
base for the engine's longest request instead: the same as transformers up to the original context.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over the whole head (rotate-half convention).

    Args:
        rope_type: One of `ROPE_TYPES`.
        theta: Base of the frequencies.
        head_dim: Elements rotated.
        factor: Context extension.
        original_max_positions: Context before extension, in tokens.
        max_positions: Longest context allowed, in tokens.
        low_freq_factor: Of `llama3`: wavelengths above original / this are stretched fully.
        high_freq_factor: Of `llama3`: wavelengths below original / this are left alone.
        beta_fast: Of `yarn`: rotations above which frequencies are left alone.
        beta_slow: Of `yarn`: rotations below which frequencies are stretched fully.
        attention_factor: Of `yarn`: scale of cos and sin; None computes it from the others.
        mscale: Of `yarn`: with `mscale_all_dim`, an alternative formula for the scale.
        mscale_all_dim: See `mscale`.
        truncate: Of `yarn`: round the ramp's ends to whole dimensions.
    """

    rope_type: str
    theta: float
    head_dim: int
    factor: float = 1.0
    original_max_positions: int
    max_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], head_dim: int, max_position_embeddings: int
    ) -> "RopeConfig":
        """Read the rotary settings of a parsed `config.json`, old style or new.

        Raises:
            CheckpointError: The kind of scaling is unsupported.
        """
        scaling = dict(config.get("rope_parameters") or {}) or dict(
            config.get("rope_scaling") or {}
        )
        rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
        partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if rope_type not in ROPE_TYPES or partial != 1.0:
            found = rope_type if partial == 1.0 else f"partial_rotary_factor {partial}"
            raise CheckpointError(
                f"rotary embedding '{found}' is not supported; supported: {', '.join(ROPE_TYPES)} "
                "over the whole head"
            )
        factor = float(scaling.get("factor") or 1.0)
        original = scaling.get("original_max_position_embeddings")
        extended = max_position_embeddings
        if rope_type == "yarn":
            extended = max(extended, int((original or max_position_embeddings) * factor))
        elif rope_type in ("linear", "dynamic"):
            extended = int(max_position_embeddings * factor)
        options = {
            key: float(scaling[key])
            for key in (
                "low_freq_factor",
                "high_freq_factor",
                "beta_fast",
                "beta_slow",
                "attention_factor",
                "mscale",
                "mscale_all_dim",
            )
            if scaling.get(key) is not None
        }
        return cls(
            rope_type=rope_type,
            theta=float(scaling.get("rope_theta", config.get("rope_theta", 10000.0))),
            head_dim=head_dim,
            factor=factor,
            original_max_positions=int(original or max_position_embeddings),
            max_positions=extended,
            truncate=bool(scaling.get("truncate", True)),
            **options,
        )

    def cos_sin_cache(self, max_model_len: int, device: torch.device) -> torch.Tensor:
        """Return the table the kernels read: cos in the first half of a row, sin in the second.

        Args:
            max_model_len: Rows, one a position.
            device: Where the table goes.

        Returns:
            `[max_model_len, head_dim]`, float32.
        """
        positions = torch.arange(max_model_len, dtype=torch.float32)
        angles = torch.outer(positions, self._inv_freq(max_model_len))
        table = torch.cat([angles.cos(), angles.sin()], dim=-1) * self._scale()
        return table.to(device)

    def _inv_freq(self, max_model_len: int) -> torch.Tensor:
        """Return the angle per position of each pair of elements, `[head_dim / 2]`, float32."""
        if self.rope_type == "dynamic":
            return self._powers(self._dynamic_base(max_model_len))
        inv_freq = self._powers(self.theta)
        if self.rope_type == "linear":
            return inv_freq / self.factor
        if self.rope_type == "llama3":
            return self._llama3(inv_freq)
        if self.rope_type == "yarn":
            return self._yarn(inv_freq)
        return inv_freq

    def _powers(self, base: float) -> torch.Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        return torch.as_tensor(1.0 / (base**exponents))

    def _dynamic_base(self, max_model_len: int) -> float:
        length = max(max_model_len, self.original_max_positions)
        stretch = self.factor * length / self.original_max_positions - (self.factor - 1)
        return float(self.theta * stretch ** (self.head_dim / (self.head_dim - 2)))

    def _llama3(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """Stretch long wavelengths, leave short ones, blend between (Llama 3.1 model card)."""
        wavelengths = 2 * math.pi / inv_freq
        ratio = self.original_max_positions / wavelengths
        smooth = (ratio - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = smooth.clamp(0.0, 1.0)
        return (1 - smooth) * inv_freq / self.factor + smooth * inv_freq

    def _yarn(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """Blend by the number of rotations within the original context (arXiv 2309.00071)."""
        low = self._yarn_dimension(self.beta_fast)
        high = self._yarn_dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        span = max(high - low, 0.001)
        ramp = (torch.arange(self.head_dim // 2, dtype=torch.float32) - low) / span
        stretched = ramp.clamp(0.0, 1.0)
        return inv_freq / self.factor * stretched + inv_freq * (1 - stretched)

    def _yarn_dimension(self, num_rotations: float) -> float:
        period = self.original_max_positions / (num_rotations * 2 * math.pi)
        return self.head_dim * math.log(period) / (2 * math.log(self.theta))

    def _scale(self) -> float:
        """Return the factor on cos and sin, by which YaRN sharpens the attention."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
