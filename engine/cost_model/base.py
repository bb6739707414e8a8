"""What the scheduler asks of a cost model: how long each part of a step takes.

The parts are those that the pipeline is made of, so that `predict` can put a whole step together.
Times are seconds; parts of a layer are those of one layer, all layers being alike.
"""

from typing import Protocol

ROTATING_HANDOVER_SHARE = 0.45
"""What a hand-over costs the device if nobody waits for its answer, of one that is waited for: 8.7
of 19.5 µs on an H200, where a step with 121 rotating rows took 5.63 ms and one without 5.35."""


class CostModel(Protocol):
    """Predicts the parts of a step for one model on one machine."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""

    @property
    def most_direct_share(self) -> float:
        """Most of the tokens that rotating rows attend to that the device may do, over PCIe."""

    def linear_s(self, num_rows: int, *, rotating: bool = False) -> float:
        """Return the time of one layer's work on rows: projections, MLP, norms, rotary, stores.

        Args:
            num_rows: Rows.
            rotating: There are rotating rows in the step.
        """

    def prefill_attention_s(self, query_len: int, context_len: int) -> float:
        """Return the time of one layer's prefill attention.

        Args:
            query_len: Tokens of the chunk.
            context_len: Tokens in the cache after the chunk, the chunk included.
        """

    def gpu_attention_s(self, num_seqs: int, total_tokens: int) -> float:
        """Return the time of one layer's decode attention on the device; 0 without rows."""

    def cpu_attention_s(self, num_rows: int, total_tokens: int, *, rotating: bool = False) -> float:
        """Return the time of one layer's decode attention on the host; 0 without rows.

        Args:
            num_rows: Rows.
            total_tokens: Tokens that they attend to.
            rotating: They rotate: nobody waits for each layer's answer.
        """

    def handover_s(self, *, rotating: bool = False) -> float:
        """Return the device's own time for one layer's hand-over to the host and back."""

    def launch_s(self, num_handovers: int) -> float:
        """Return the host's time to launch one layer of one sub-batch, kernel by kernel.

        The device cannot be faster than this, except in steps that are launched as one graph: see
        `engine.graph_limits`.

        Args:
            num_handovers: 1 if the sub-batch hands rows over to the host, else 0.
        """

    def swap_s(self, num_tokens: int) -> float:
        """Return the time to move the K and V of tokens, all layers, in one direction."""

    def fixed_step_s(self, num_sampled: int) -> float:
        """Return what a step costs beside its layers: embedding, head, sampling, launches."""
