"""The dense decoder that Llama, Mistral, Qwen2, Qwen3 and SmolLM2 have in common.

Each layer is split where attention happens, so that a pipeline can run the two halves of different
sub-batches in any order: `before_attention`, the backend's attention, `after_attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.backends import AttentionShape, Backend, LayerNorms, NextNorm, NormedRows
from engine.batch import Batch
from engine.model_config import ModelConfig
from engine.models.weights import ModelWeights


@dataclass(slots=True)
class _Lane:
    """Where a sub-batch stands: `[T, H]` before a layer, residual stream, the open attention."""

    normed: NormedRows
    residual: torch.Tensor
    attended: torch.Tensor | None = None


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
        eps, layers = config.rms_norm_eps, weights.layers
        self._mlp_norms = [NextNorm(layer.mlp_norm, eps, layer.gate_up) for layer in layers]
        self._next_norms = [NextNorm(layer.input_norm, eps, layer.qkv) for layer in layers[1:]]
        self._next_norms.append(NextNorm(weights.final_norm, eps, None))
        self._first_norm = NextNorm(layers[0].input_norm, eps, layers[0].qkv)

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
        self, states: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> torch.Tensor:
        """Return logits of all sub-batches' `logits_rows`, one behind the other.

        The head is read once for all of them.

        Args:
            states: From `run_layers`.
            batches: What it was given.

        Returns:
            `[L, vocab_size]`, the model's dtype.
        """
        wanted = [
            rows if batch.logits_rows is None else rows[batch.logits_rows]
            for rows, batch in zip(states, batches, strict=True)
        ]
        return self.logits(wanted[0] if len(wanted) == 1 else torch.cat(wanted))

    @torch.inference_mode()
    def run_layers(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Run the sub-batches of a step through all layers, one behind the other.

        In each layer, a sub-batch's CPU attention has all the time in which the other one does its
        linear layers and its own attention; with a single sub-batch it is waited for at once. The
        backend must have been told of the step by `begin_step`.

        Args:
            batches: The step's input, T tokens each; only one of them if it has rotating rows.

        Returns:
            What each sub-batch's rows came to behind the final norm, `[T, H]`.
        """
        if batches[0].rotating is not None:
            [batch] = batches
            return [self._run_rotating(batch)]
        lanes = []
        for batch in batches:
            residual = self._new_stream(batch.num_tokens)
            lanes.append(_Lane(self._embed(batch, residual), residual))
        for layer in range(self.config.num_layers):
            for index, lane in enumerate(lanes):
                self._finish_layer(index, layer - 1, lane)
                qkv = self.before_attention(layer, lane.normed)
                lane.attended = self.start_attention(index, layer, qkv)
        for index, lane in enumerate(lanes):
            self._finish_layer(index, self.config.num_layers - 1, lane)
        return [lane.normed.rows for lane in lanes]

    def _new_stream(self, num_rows: int) -> torch.Tensor:
        """Return room for a residual stream."""
        embedding = self.weights.embedding
        return embedding.new_empty(num_rows, embedding.shape[1])

    def _embed(self, batch: Batch, stream: torch.Tensor) -> NormedRows:
        """Fill the residual stream, `[T, H]`, and return it behind the first norm."""
        return self._backend.embed(batch, self.weights.embedding, stream, self._first_norm)

    def _run_rotating(self, batch: Batch) -> torch.Tensor:
        """Run a batch in which rotating rows come and go.

        Resident rows go through every layer. A rotating row arrives behind a layer's attention,
        which the CPU has computed since the last such step, and departs with Q, K and V of the next
        layer. Returned are the resident rows and those that were behind the last layer.
        """
        rows = batch.rotating
        assert rows is not None, "there are rotating rows"
        num_resident, num_rows = batch.num_resident_tokens, batch.num_tokens
        # One residual stream, with room for visitors behind the resident rows.
        stream = self._new_stream(num_resident + rows.most_at_once)
        normed = self._embed(batch, stream[:num_rows])
        for layer in range(self.config.num_layers):
            arriving = rows.arriving(layer)
            num_visitors = arriving.stop - arriving.start
            # If nobody departs, the CPU is to hear of it.
            qkv = self.before_attention(layer, normed) if num_rows else stream[:0]
            departing = slice(num_resident, num_rows)
            norms = self._norms[layer]
            self._backend.depart(layer, qkv[departing], stream[departing], self._cos_sin, norms)
            if num_resident:
                attended = self.start_attention(0, layer, qkv[:num_resident], num_visitors)
            else:
                width = self.weights.layers[layer].out.shape[1]
                attended = stream.new_empty(num_visitors, width)
            num_rows = num_resident + num_visitors
            if num_visitors:
                self._backend.arrive(layer, attended[num_resident:], stream[num_resident:num_rows])
            if num_rows:
                normed = self.after_attention(layer, attended, stream[:num_rows])
        return normed.rows[:num_rows]

    def _finish_layer(self, index: int, layer: int, lane: "_Lane") -> None:
        """Take the CPU's rows of a layer's attention and compute the rest of the layer."""
        if lane.attended is None:
            return  # before the first layer
        self._backend.finish_attention(index, layer, lane.attended)
        lane.normed = self.after_attention(layer, lane.attended, lane.residual)

    def before_attention(self, layer: int, normed: NormedRows) -> torch.Tensor:
        """Project to Q, K and V.

        Args:
            layer: Index of the layer.
            normed: `[T, H]`, behind the layer's first norm.

        Returns:
            Q, K and V side by side, `[T, (num_q_heads + 2 * num_kv_heads) * head_dim]`.
        """
        weights = self.weights.layers[layer]
        return self._backend.linear(normed, weights.qkv, weights.qkv_bias)

    def start_attention(
        self, lane: int, layer: int, qkv: torch.Tensor, num_visitors: int = 0
    ) -> torch.Tensor:
        """Start a layer's attention on the backend; see `Backend.start_attention`."""
        norms = self._norms[layer]
        return self._backend.start_attention(lane, layer, qkv, self._cos_sin, norms, num_visitors)

    def after_attention(
        self, layer: int, attended: torch.Tensor, residual: torch.Tensor
    ) -> NormedRows:
        """Project the attention's output and run the MLP.

        Args:
            layer: Index of the layer.
            attended: `[T, num_q_heads * head_dim]`.
            residual: `[T, H]`, updated in place.

        Returns:
            `[T, H]`, behind the norm that follows: the next layer's first, or the final one.
        """
        weights, linear_add_norm = self.weights.layers[layer], self._backend.linear_add_norm
        normed = linear_add_norm(
            attended, weights.out, weights.out_bias, residual, self._mlp_norms[layer]
        )
        activated = self._backend.gated_linear(normed, weights.gate_up, weights.gate_up_bias)
        return linear_add_norm(
            activated, weights.down, weights.down_bias, residual, self._next_norms[layer]
        )

    @torch.inference_mode()
    def logits(self, states: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the head's output for rows behind the final norm: `[L, vocab_size]`, their dtype.

        Args:
            states: `[L, H]`, from `run_layers`.
            out: Where to; None makes room.
        """
        return torch.mm(states, self.weights.lm_head.t(), out=out)
