"""What one step asks of the attention service, and what it reports. Data only."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The requests that share one pair of doorbells in a step, row by row.

    Args:
        block_tables: `[num_seqs, max_blocks]`, int32, CPU, any row stride; entries past a request's
            end are not read.
        seq_lens: `[num_seqs]`, int32, CPU: tokens to attend to, including the new one.
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """How a step went.

    Args:
        num_layers: Layers served.
        attention_s: Time in attention by lane, all layers, s.
        waiting_s: Time in which the service was idle inside the step, waiting for requests, s.
        handover_s: Median over layers and lanes of the time from a request seen to attention begun
            plus from attention ended to the answer rung, s. What the device needs to see an answer
            and the service to see a request is not in it: compare the timeline with the device's.
        wall_s: From the first request seen to the last answer, s.
        timeline_ns: `[num_layers, num_lanes, 4]`, int64, ns of CLOCK_MONOTONIC: request seen,
            attention begun, attention ended, answer rung.
    """

    num_layers: int
    attention_s: tuple[float, ...]
    waiting_s: float
    handover_s: float
    wall_s: float
    timeline_ns: torch.Tensor
