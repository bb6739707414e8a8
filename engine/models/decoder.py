"""The dense decoder that Llama, Mistral, Qwen2, Qwen3 and SmolLM2 have in common.

Each layer is split where attention happens, so that a pipeline can run the two halves of different
sub-batches in any order: `before_attention`, the backend's attention, `after_attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.backends import AttentionShape, Backend, LayerNorms
from engine.batch import Batch
from engine.model_config import ModelConfig
from engine.models.weights import ModelWeights


@dataclass(slots=True)
class _Lane:
    """Where a sub-batch stands: `[T, H]`, the residual stream, the open attention."""

    hidden: torch.Tensor
    residual: torch.Tensor | None = None
    attended: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class FinalStates:
    """What a sub-batch's rows came to behind the last layer: `[T, H]` each, not yet added up."""

    hidden: torch.Tensor
    residual: torch.Tensor

    def select(self, rows: torch.Tensor) -> "FinalStates":
        """Return some rows only, by their numbers."""
        return FinalStates(self.hidden[rows], self.residual[rows])


class DecoderModel:
    """A decoder on one device.

    Args:
        config: The model's shape.
        weights: Its parameters, filled.
        backend: Kernels and KV cache.
        max_model_len: Most tokens of a request; sizes the table of rotary angles.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, backend: Backend, max_model_len: int
    ) -> None:
        self.config = config
        self.weights = weights
        self._backend = backend
        self._cos_sin = config.rope.cos_sin_cache(max_model_len, backend.device)
        self._norms = [
            LayerNorms(layer.q_norm, layer.k_norm, config.rms_norm_eps)
            if layer.q_norm is not None and layer.k_norm is not None
            else None
            for layer in weights.layers
        ]

    def attention_shape(self, block_size: int) -> AttentionShape:
        """Return what the backend must know to make the KV cache."""
        return AttentionShape(
            num_layers=self.config.num_layers,
            num_q_heads=self.config.num_q_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            block_size=block_size,
            dtype=self.weights.embedding.dtype,
        )

    @torch.inference_mode()
    def forward(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Run the sub-batches of a step: `run_layers`, then `sampling_logits`."""
        return self.sampling_logits(self.run_layers(batches), batches)

    def sampling_logits(
        self, states: Sequence[FinalStates], batches: Sequence[Batch]
    ) -> torch.Tensor:
        """Return logits of all sub-batches' `logits_rows`, one behind the other.

        The head is read once for all of them.

        Returns:
            `[L, vocab_size]`, the model's dtype.
        """
        wanted = [
            rows if batch.logits_rows is None else rows.select(batch.logits_rows)
            for rows, batch in zip(states, batches, strict=True)
        ]
        if len(wanted) == 1:
            return self.logits(wanted[0].hidden, wanted[0].residual, None)
        hidden = torch.cat([rows.hidden for rows in wanted])
        return self.logits(hidden, torch.cat([rows.residual for rows in wanted]), None)

    @torch.inference_mode()
    def run_layers(self, batches: Sequence[Batch]) -> list[FinalStates]:
        """Run the sub-batches of a step through all layers, one behind the other.

        In each layer, a sub-batch's CPU attention has all the time in which the other one does its
        linear layers and its own attention; with a single sub-batch it is waited for at once. The
        backend must have been told of the step by `begin_step`.

        Args:
            batches: The step's input, T tokens each; only one of them if it has rotating rows.
        """
        if batches[0].rotating is not None:
            [batch] = batches
            return [self._run_rotating(batch)]
        lanes = [_Lane(F.embedding(batch.input_ids, self.weights.embedding)) for batch in batches]
        for layer in range(self.config.num_layers):
            for index, lane in enumerate(lanes):
                self._finish_layer(index, layer - 1, lane)
                qkv, lane.residual = self.before_attention(layer, lane.hidden, lane.residual)
                lane.attended = self.start_attention(index, layer, qkv)
        states = []
        for index, lane in enumerate(lanes):
            self._finish_layer(index, self.config.num_layers - 1, lane)
            assert lane.residual is not None
            states.append(FinalStates(lane.hidden, lane.residual))
        return states

    def _run_rotating(self, batch: Batch) -> FinalStates:
        """Run a batch in which rotating rows come and go.

        Resident rows go through every layer. A rotating row arrives behind a layer's attention,
        which the CPU has computed since the last such step, and departs with Q, K and V of the next
        layer. Returned are the resident rows and those that were behind the last layer.
        """
        rows = batch.rotating
        assert rows is not None, "there are rotating rows"
        hidden = F.embedding(batch.input_ids, self.weights.embedding)
        num_resident, num_rows = batch.num_resident_tokens, hidden.shape[0]
        # One residual stream, with room for visitors behind the resident rows.
        stream = hidden.new_empty(num_resident + rows.most_at_once, hidden.shape[1])
        for layer in range(self.config.num_layers):
            arriving = rows.arriving(layer)
            num_visitors = arriving.stop - arriving.start
            if num_rows:
                residual = None if layer == 0 else stream[:num_rows]
                qkv, residual = self.before_attention(layer, hidden, residual)
                if layer == 0:
                    stream[:num_rows].copy_(residual)
            else:
                qkv = hidden[:0]  # nobody departs, but the CPU is to hear of it
            departing = slice(num_resident, num_rows)
            norms = self._norms[layer]
            self._backend.depart(layer, qkv[departing], stream[departing], self._cos_sin, norms)
            if num_resident:
                attended = self.start_attention(0, layer, qkv[:num_resident], num_visitors)
            else:
                attended = hidden.new_empty(num_visitors, self.weights.layers[layer].out.shape[1])
            num_rows = num_resident + num_visitors
            if num_visitors:
                self._backend.arrive(layer, attended[num_resident:], stream[num_resident:num_rows])
            if num_rows:
                hidden, _ = self.after_attention(layer, attended, stream[:num_rows])
        return FinalStates(hidden[:num_rows], stream[:num_rows])

    def _finish_layer(self, index: int, layer: int, lane: "_Lane") -> None:
        """Take the CPU's rows of a layer's attention and compute the rest of the layer."""
        if lane.attended is None or lane.residual is None:
            return  # before the first layer
        self._backend.finish_attention(index, layer, lane.attended)
        lane.hidden, lane.residual = self.after_attention(layer, lane.attended, lane.residual)

    def before_attention(
        self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise and project to Q, K and V.

        Args:
            layer: Index of the layer.
            hidden: `[T, H]`: the embedding, or the last layer's MLP output.
            residual: `[T, H]`, updated in place; None before the first layer.

        Returns:
            Q, K and V side by side, `[T, (num_q_heads + 2 * num_kv_heads) * head_dim]`, and the
            residual stream.
        """
        weights = self.weights.layers[layer]
        eps = self.config.rms_norm_eps
        if residual is None:
            residual = hidden
            normed = self._backend.rms_norm(hidden, weights.input_norm, eps)
        else:
            normed = self._backend.add_rms_norm(hidden, residual, weights.input_norm, eps)
        return self._backend.linear(normed, weights.qkv, weights.qkv_bias), residual

    def start_attention(
        self, lane: int, layer: int, qkv: torch.Tensor, num_visitors: int = 0
    ) -> torch.Tensor:
        """Start a layer's attention on the backend; see `Backend.start_attention`."""
        norms = self._norms[layer]
        return self._backend.start_attention(lane, layer, qkv, self._cos_sin, norms, num_visitors)

    def after_attention(
        self, layer: int, attended: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project the attention's output and run the MLP.

        Args:
            layer: Index of the layer.
            attended: `[T, num_q_heads * head_dim]`.
            residual: `[T, H]`, updated in place.

        Returns:
            The MLP's output, not yet added to the residual stream, and that stream.
        """
        weights = self.weights.layers[layer]
        out = self._backend.linear(attended, weights.out, weights.out_bias)
        normed = self._backend.add_rms_norm(
            out, residual, weights.mlp_norm, self.config.rms_norm_eps
        )
        activated = self._backend.gated_linear(normed, weights.gate_up, weights.gate_up_bias)
        return self._backend.linear(activated, weights.down, weights.down_bias), residual

    @torch.inference_mode()
    def logits(
        self, hidden: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the head's output for some rows, or all: `[L, vocab_size]`, the model's dtype."""
        if rows is not None:
            hidden, residual = hidden[rows], residual[rows]
        normed = self._backend.add_rms_norm(
            hidden, residual, self.weights.final_norm, self.config.rms_norm_eps
        )
        return F.linear(normed, self.weights.lm_head)
